"""The compiled kernels give numpy's bits, and nothing fails or waits where they are not there."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from expertd import ExpertGroup, _fast
from expertd._combine import combine
from expertd._split import owners, split
from expertd.tensors import to_wire

BFLOAT16 = ml_dtypes.bfloat16
WAIT_S = 60


def run_of(num_tokens: int) -> np.ndarray[Any, Any]:
    """All tokens as one run."""
    return np.array([[0, 0, num_tokens]])


def bits_of(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits, with all NaN alike: which sign the sum of two NaN has, a processor may decide either way."""
    bits = values.view(np.uint16).copy()
    bits[np.isnan(values)] = 0x7FC0
    return bits


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("exponents", [range(256), range(120, 130)])
def test_sums_of_any_bits_are_the_same(both_ways: Any, num_parts: int, exponents: range) -> None:
    # All exponents: infinities, NaN of both signs, zeros, subnormals. Few: sums that end halfway between two bfloat16.
    random = np.random.default_rng(num_parts)
    shape = (64, 512)
    parts = []
    for _ in range(num_parts):
        sign, fraction = random.integers(0, 2, shape), random.integers(0, 128, shape)
        bits = sign << 15 | random.choice(exponents, shape) << 7 | fraction
        parts.append((run_of(shape[0]), bits.astype(np.uint16).view(BFLOAT16)))
    with np.errstate(over="ignore", invalid="ignore"):
        by_numpy, compiled = both_ways(lambda: combine(*shape, parts, BFLOAT16))
    assert np.array_equal(bits_of(by_numpy), bits_of(compiled)), f"seed {num_parts}"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_rows", [[1000] * 3, [1, 7, 64]])
@pytest.mark.parametrize("broadcast", [False, True])
def test_parts_are_the_same(both_ways: Any, seed: int, max_rows: list[int], broadcast: bool) -> None:
    random = np.random.default_rng(seed)
    num_tokens = (0, 1, 20, 150)[seed]
    ids = random.integers(-1, 12, (num_tokens, 2), dtype=np.int32)
    weights = random.random((num_tokens, 2), np.float32).astype(BFLOAT16)
    hidden_states, _ = to_wire("hidden_states", random.random((num_tokens, 8), np.float32))
    slot_owners = owners(ids, 12, [range(5), range(5, 6), range(8, 12)])

    def describe() -> list[Any]:
        parts = split(hidden_states, ids, weights, slot_owners, max_rows, broadcast=broadcast)
        return [
            (
                part.shard,
                part.rows.tolist(),
                part.runs.tolist(),
                *((each.dtype, each.shape, each.numpy().tobytes()) for each in (part.topk_ids, part.topk_weights)),
                part.hidden_states.numpy().tobytes(),
            )
            for part in parts
        ]

    by_numpy, compiled = both_ways(describe)
    assert by_numpy == compiled, f"seed {seed}"


def test_a_group_loads_them_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on, kernels = threading.Event(), object()

    def slow_import(name: str) -> Any:
        assert name == "expertd._kernels"
        assert may_go_on.wait(WAIT_S)
        return kernels

    loader = _fast._Loader()
    monkeypatch.setattr(_fast, "_loader", loader)
    monkeypatch.setattr(_fast.importlib, "import_module", slow_import)
    with ExpertGroup(["localhost:1"]):
        assert _fast.kernels() is None
        may_go_on.set()
        assert _fast.warm_up(WAIT_S)
        assert _fast.kernels() is kernels


def test_without_numba_there_is_one_line_for_the_debugger(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_fast, "_loader", _fast._Loader())
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "expertd._kernels", raising=False)
    with caplog.at_level(logging.DEBUG, "expertd"):
        assert not _fast.warm_up(WAIT_S)
        assert not _fast.warm_up(WAIT_S)
    assert _fast.kernels() is None
    (record,) = [record for record in caplog.records if "numpy alone" in record.message]
    assert record.levelno == logging.DEBUG
    assert "numba" in record.message


COLORAMA = """
import sys
__version__ = "0.4.6"
class Any:
    def __getattr__(self, name): return ""
Fore = Back = Style = Any()
def init(): sys.exit("sys.stdout is replaced")
reinit = deinit = init
"""
LOAD = """
import os, expertd._fast
assert expertd._fast.warm_up(60)
assert "NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING" not in os.environ
"""


def test_numba_leaves_the_output_of_others_alone(tmp_path: Path) -> None:
    """With colorama it would put a stream of its own in place of sys.stdout now and then, in our thread."""
    pytest.importorskip("numba", reason="needs numba: pip install 'expertd[fast]'")
    (tmp_path / "colorama.py").write_text(COLORAMA)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
