"""What `import expertd` offers, and what it costs."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import expertd
import expertd.config
import expertd.errors
import expertd.types

_PROBE = """
import sys
import expertd
[getattr(expertd, name) for name in expertd.__all__]
heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "expertd_server", "pytest"})
print(heavy)
"""


def test_all_names_what_there_is_in_order() -> None:
    assert expertd.__all__ == sorted(set(expertd.__all__))
    for name in expertd.__all__:
        assert hasattr(expertd, name), name


def test_every_error_and_every_config_class_is_exported() -> None:
    public = {*expertd.errors.__all__, *expertd.config.__all__}
    assert public <= set(expertd.__all__), public - set(expertd.__all__)


def test_types_that_callers_meet_are_exported() -> None:
    public = {*expertd.types.__all__} - {"Array", "ArrayT"}
    assert public <= set(expertd.__all__), public - set(expertd.__all__)


def test_import_waits_for_nothing_that_is_not_used() -> None:
    code = "import sys, expertd; print(sorted({'asyncio', 'grpc', 'numpy'} & set(sys.modules)))"
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert probe.stdout.strip() == "[]"
    assert set(expertd._MODULE_OF) == {*expertd.__all__} - {"__version__"}
    assert set(dir(expertd)) >= {*expertd.__all__}
    with pytest.raises(AttributeError, match="has no attribute 'Clients'"):
        expertd.Clients  # noqa: B018


def test_import_brings_no_torch() -> None:
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=60, check=True)
    assert probe.stdout.strip() == "[]"


def test_the_distribution_needs_what_workers_can_install_without_a_compiler() -> None:
    """All of these publish wheels; torch is the caller's own affair."""
    required = [line for line in importlib.metadata.requires("expertd") or () if "extra ==" not in line]
    needed = {re.split(r"[<>=!~ ;\[]", line)[0].replace("_", "-") for line in required}
    assert needed == {
        "googleapis-common-protos",
        "grpcio",
        "grpcio-health-checking",
        "ml-dtypes",
        "numpy",
        "protobuf",
    }


def test_package_is_typed() -> None:
    assert (Path(expertd.__file__).parent / "py.typed").exists()


def test_version_is_that_of_the_distribution() -> None:
    assert expertd.__version__ == importlib.metadata.version("expertd")


def test_sync_and_async_clients_have_the_same_methods() -> None:
    def names(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert names(expertd.Client) == names(expertd.AsyncClient)
