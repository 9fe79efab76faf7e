"""What `import expertd` offers, and what it costs."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import expertd
import expertd.config
import expertd.errors
import expertd.types

_PROBE = """
import sys
import expertd
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


def test_import_brings_no_torch() -> None:
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=60, check=True)
    assert probe.stdout.strip() == "[]"


def test_package_is_typed() -> None:
    assert (Path(expertd.__file__).parent / "py.typed").exists()


def test_version_is_that_of_the_distribution() -> None:
    assert expertd.__version__ == importlib.metadata.version("expertd")


def test_sync_and_async_clients_have_the_same_methods() -> None:
    def names(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert names(expertd.Client) == names(expertd.AsyncClient)
