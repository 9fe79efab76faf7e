"""What tests of the client's arithmetic share."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import pytest

from expertd import _fast

T = TypeVar("T")


def compiled_kernels() -> ModuleType:
    """The kernels, compiled; skips the test where numba is not installed."""
    pytest.importorskip("numba")
    from expertd import _kernels

    return _kernels


@pytest.fixture(params=["numpy", "compiled"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType | None:
    """The test runs twice: with numpy alone, and with the compiled kernels."""
    module = compiled_kernels() if request.param == "compiled" else None
    monkeypatch.setattr(_fast, "kernels", lambda: module)
    return module


class BothWays:
    """Calls a function with numpy alone, then with the compiled kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._ways = (None, compiled_kernels())

    def __call__(self, function: Callable[[], T]) -> tuple[T, T]:
        results = []
        for module in self._ways:
            self._monkeypatch.setattr(_fast, "kernels", lambda module=module: module)
            results.append(function())
        return results[0], results[1]


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> BothWays:
    """See BothWays."""
    return BothWays(monkeypatch)


@pytest.fixture
def odd() -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Moves an array to where its elements should not lie, as a view of received bytes may."""

    def move(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        memory = np.empty(array.nbytes + 1, np.uint8)
        memory[1:] = array.reshape(-1).view(np.uint8)
        return memory[1:].view(array.dtype).reshape(array.shape)

    return move
