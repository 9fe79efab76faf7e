"""Work on bytes that the compiled codec does where it was built, and numpy where not."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from expertd_server.compiled import CODEC

__all__ = ["copy_bytes", "count_ids"]


def _copy_bytes(destination: Any, offset: int, source: Any) -> None:
    """Write a buffer's bytes into a contiguous writable one, from `offset` on. Raises ValueError if they do not fit."""
    flat = np.frombuffer(source, np.uint8)
    np.frombuffer(destination, np.uint8)[offset : offset + len(flat)] = flat


def _count_ids(ids: npt.NDArray[np.signedinteger[Any]], first: int, counts: npt.NDArray[np.int64]) -> None:
    """Add to counts[id - first] for each of the ids [n], int16, int32 or int64, that is in range."""
    local = ids - first
    counts += np.bincount(local[(local >= 0) & (local < len(counts))], minlength=len(counts))


count_ids = _count_ids if CODEC is None else CODEC.count_ids
copy_bytes = _copy_bytes if CODEC is None else CODEC.copy
