"""The compiled code of the host under AddressSanitizer and UndefinedBehaviorSanitizer: it reads bytes from the network,
and memory that other processes write at the same time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
TESTED = ["codec", "message_memory", "direct", "ring", "blocks", "bundle", "cpu_experts"]
_BUILD_TIMEOUT_S, _RUN_TIMEOUT_S = 400, 600

# Without `site`, because an editable installation comes before any path.
RUN = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import pytest; sys.exit(pytest.main(sys.argv[2:]))"


def runtimes() -> list[str]:
    """The libraries that a process must have before all others. Skips the test where there are none."""
    missing = [tool for tool in ("cmake", "ninja", "g++") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    found = []
    for name in ("libasan.so", "libubsan.so"):
        asked = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        found.append(asked.stdout.strip())
        if not Path(found[-1]).is_absolute():
            pytest.skip(f"g++ has no {name}")
    return found


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the server's package and modules that were built for it."""
    runtimes()
    folder = tmp_path_factory.mktemp("sanitized")
    build, package = folder / "build", folder / "expertd_server"
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(build), "-DEXPERTD_CUDA=off"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_FLAGS={FLAGS}", "-DCMAKE_CXX_COMPILER=g++"]
    for command in (configure, ["ninja", "-C", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(ROOT / "server" / "expertd_server", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    modules = list(build.glob("*.so"))
    assert {module.name.split(".")[0] for module in modules} >= {"_codec", "_blocks"}
    for module in modules:
        shutil.copy(module, package)
    return package


def run(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest, with the modules of that package."""
    options = "detect_leaks=0:abort_on_error=1"  # the interpreter keeps much until its end
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes()),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # so that every object is a piece of memory of its own
    }
    command = [sys.executable, "-S", "-c", RUN, json.dumps([str(package.parent), *sys.path])]
    command += ["-q", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=_RUN_TIMEOUT_S, check=False
    )


@pytest.mark.timeout(_RUN_TIMEOUT_S)
@pytest.mark.parametrize("name", TESTED)
def test_nothing_touches_memory_that_is_not_its_own(name: str, package: Path) -> None:
    done = run(package, "-x", f"tests/unit/test_{name}.py")
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-20_000:]


@pytest.mark.timeout(_RUN_TIMEOUT_S)
def test_what_does_is_found(package: Path, tmp_path: Path) -> None:
    """The modules are the instrumented ones."""
    test = tmp_path / "test_beyond.py"
    test.write_text(
        "import ctypes\n"
        "from expertd_server.compiled import CODEC\n"
        "def test_beyond():\n"
        "    few = ctypes.create_string_buffer(1000)\n"
        "    copies = CODEC.Copies()\n"
        "    copies.add_memory(bytearray(2**20), 0, ctypes.addressof(few), 2000)\n"
        "    copies.run()\n"
    )
    done = run(package, str(test))
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr + done.stdout
