"""A run of the tests says at its end what it left out, and does not fail for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)  # Python starts two or three times, on as few as two cores
PLUGIN = Path(__file__).parents[1] / "skip_summary.py"


def run(directory: Path, *arguments: str) -> str:
    """Output of a run of the tests in a directory, with our summary; every run here ends well."""
    shutil.copy(PLUGIN, directory / "conftest.py")
    (directory / "pytest.ini").write_text("[pytest]\nmarkers = gpu: of the tests\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("workers", ["0", "1"], ids=["here", "through xdist"])
def test_what_was_skipped_is_counted_by_reason(tmp_path: Path, workers: str) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_that_runs(): pass\n"
        "@pytest.fixture\n"
        "def engine(): pytest.skip('no Docker engine: none')\n"
        "def test_one(engine): pass\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "@pytest.mark.skip(reason='needs a moon')\n"
        "def test_two(n): pass\n"
    )
    (tmp_path / "test_ray.py").write_text("import pytest\npytest.importorskip('no_such_module', reason='needs Ray')\n")
    lines = run(tmp_path, "-n", workers).splitlines()
    (start,) = (number for number, line in enumerate(lines) if "NOT RUN HERE: 4 skipped" in line)
    told = [line.strip() for line in lines[start + 1 : start + 4]]
    assert told[0] == "2 tests: needs a moon"
    assert set(told[1:]) == {"1 tests: no Docker engine: none", "1 files: needs Ray"}


def test_a_run_that_leaves_nothing_out_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_all.py").write_text("def test_that_runs(): pass\n")
    assert "NOT RUN" not in run(tmp_path)
