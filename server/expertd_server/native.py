"""Work on bytes that the compiled codec does where it was built, and numpy where not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from expertd_server.compiled import CODEC

__all__ = ["Copies", "HostIds", "address_of", "copy_bytes", "count_ids", "count_tensor_ids"]


def _address_of(memory: Any) -> int:
    """Where a buffer's bytes lie."""
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def _copy_bytes(destination: Any, offset: int, source: Any) -> None:
    """Write a buffer's bytes into a contiguous writable one, from `offset` on. Raises ValueError if they do not fit."""
    flat = np.frombuffer(source, np.uint8)
    np.frombuffer(destination, np.uint8)[offset : offset + len(flat)] = flat


class _Copies:
    """Copies of host memory that are noted one by one, and done by `run` at the latest."""

    @staticmethod
    def add(destination: Any, offset: int, source: Any) -> None:
        """As `_copy_bytes`."""
        _copy_bytes(destination, offset, source)

    @staticmethod
    def run() -> None:
        """Nothing is left to do: Python has nothing to gain by waiting."""


class HostIds(Protocol):
    """What `count_tensor_ids` asks of a torch tensor."""

    def is_contiguous(self) -> bool: ...
    def data_ptr(self) -> int: ...
    def numel(self) -> int: ...
    def element_size(self) -> int: ...
    def numpy(self) -> npt.NDArray[Any]: ...


def count_tensor_ids(ids: HostIds, first: int, counts: npt.NDArray[np.int64]) -> None:
    """As `count_ids`, of a torch tensor: to make an array of one takes longer than to count."""
    if CODEC is not None and ids.is_contiguous():
        CODEC.count_ids_at(ids.data_ptr(), ids.numel(), ids.element_size(), first, counts)
    else:
        count_ids(np.ascontiguousarray(ids.numpy()), first, counts)


def _count_ids(ids: npt.NDArray[np.signedinteger[Any]], first: int, counts: npt.NDArray[np.int64]) -> None:
    """Add to counts[id - first] for each of the ids [n], int16, int32 or int64, that is in range."""
    local = ids - first
    counts += np.bincount(local[(local >= 0) & (local < len(counts))], minlength=len(counts))


count_ids = _count_ids if CODEC is None else CODEC.count_ids
if TYPE_CHECKING:
    from expertd_server._codec import Copies
else:
    Copies = _Copies if CODEC is None else CODEC.Copies
address_of = _address_of if CODEC is None else CODEC.address_of
copy_bytes = _copy_bytes if CODEC is None else CODEC.copy
