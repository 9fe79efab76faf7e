"""Compiled kernels for routing, splitting and summing, where numba is installed (`pip install expertd[fast]`).

Importing numba and compiling takes up to some seconds, so a thread does it. Until it has, and where numba is not
installed or does not work, numpy does the same, to the bit.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["aligned", "kernels", "warm_up"]

logger = logging.getLogger("expertd")


class _Loader:
    """Thread-safe."""

    def __init__(self) -> None:
        self.kernels: ModuleType | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> threading.Thread:
        """Begin to load, once."""
        with self._lock:
            if self._thread is None:
                # NOTE: not a daemon: the process must not end, and take LLVM down, while LLVM is compiling.
                self._thread = threading.Thread(target=self._load, name="expertd-compile", daemon=False)
                self._thread.start()
            return self._thread

    def _load(self) -> None:
        try:
            with _uncoloured_messages():
                self.kernels = importlib.import_module("expertd._kernels")
        except Exception as error:  # numba, what it builds on and the compiler fail in many ways
            logger.debug("groups compute with numpy alone: %s: %s", type(error).__name__, error)


@contextlib.contextmanager
def _uncoloured_messages() -> Iterator[None]:
    """Have numba, if it is first imported inside, leave sys.stdout alone.

    Where colorama is installed, numba puts another stream in place of sys.stdout and of sys.stderr whenever it words a
    message, and the compiler words many that nobody sees. In a thread of its own that undoes what others redirect.
    """
    name = "NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_loader = _Loader()


def kernels() -> ModuleType | None:
    """The module `expertd._kernels` once it is there, else None. Never waits."""
    return _loader.kernels


def aligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array as kernels take it: contiguous, and at an address that its elements may lie at."""
    is_fit = array.flags.c_contiguous and array.flags.aligned
    return array if is_fit else np.require(array, requirements=("C", "A"))


def warm_up(timeout_s: float | None = None) -> bool:
    """Begin to load the kernels; with timeout_s, wait that long for them. Returns whether they are there."""
    thread = _loader.start()
    if timeout_s is not None:
        thread.join(timeout_s)
    return _loader.kernels is not None
