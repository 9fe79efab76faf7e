"""The built kernels, read on the host: the machine code that the compiler made, and what the build refuses."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

CHECK_BUILD = Path(__file__).parents[2] / "csrc" / "check_build.py"


def check_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_build", CHECK_BUILD)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built_module() -> Path:
    found = importlib.util.find_spec("expertd_server._cuda")
    if found is None or found.origin is None:
        pytest.skip("the kernels were not compiled here")
    return Path(found.origin)


def test_every_product_uses_the_fp8_tensor_cores_and_no_local_memory() -> None:
    command = [sys.executable, str(CHECK_BUILD), "--sass", str(built_module())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2 and "no cuobjdump" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 bad" in done.stdout


SERIALIZED = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
SPILLS = "Function properties for {}\n    8 bytes stack frame, {} bytes spill stores, {} bytes spill loads"


@pytest.mark.parametrize(
    ("log", "complaints"),
    [
        (SERIALIZED, 1),
        (SPILLS.format("_Z19grouped_gemm_kernel", 0, 4), 1),
        (SPILLS.format("_Z19grouped_gemm_kernel", 8, 0), 1),
        (SPILLS.format("_Z19grouped_gemm_kernel", 0, 0), 0),
        (SPILLS.format("_Z5route", 8, 4), 0),
        ("ptxas info : Used 168 registers", 0),
    ],
)
def test_what_the_build_complains_about(log: str, complaints: int) -> None:
    assert len(check_build().complaints(log)) == complaints
