"""What tests of arrays in a client's shared memory have in common."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from sdk_cases import Driver
from serving import HIDDEN_SIZE, NUM_EXPERTS
from shared_memory import eventually

SEED = 20261128
BFLOAT16 = ml_dtypes.bfloat16
ROW_NBYTES = 2 * HIDDEN_SIZE
"""Of an output in bfloat16."""


def values(num_tokens: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    chance = np.random.default_rng(SEED + seed)
    hidden = chance.standard_normal((num_tokens, HIDDEN_SIZE), np.float32)
    return hidden, chance.standard_normal((num_tokens, NUM_EXPERTS), np.float32)


def lent(driver: Driver, array: np.ndarray[Any, Any]) -> Any:
    """A copy of an array in the client's memory."""
    copy = driver.empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def an_out(driver: Driver, num_tokens: int, dtype: Any = BFLOAT16) -> Any:
    """An array for the output, full of what no output holds."""
    out = driver.empty((num_tokens, HIDDEN_SIZE), dtype)
    out[...] = -77
    return out


def stream_of(driver: Driver) -> Any:
    (stream,) = driver.client._transport._streams
    return stream


def break_off(stream: Any, flavour: str) -> None:
    """End a stream's call, from any thread, and wait until the client knows."""
    if flavour == "sync":
        stream._call.cancel()
    else:
        stream._reader.get_loop().call_soon_threadsafe(stream._call.cancel)
    eventually(lambda: stream.is_open, False)
