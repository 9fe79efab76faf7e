"""Where a request's time went."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ForwardTiming"]


@dataclass(slots=True)  # not frozen, which makes making one take three times as long
class ForwardTiming:
    """Where a request's time went, in microseconds, and in what company it ran; the proto's Timing has the words."""

    queue_us: int
    copy_in_us: int
    compute_us: int
    copy_out_us: int
    batch_tokens: int
    batch_requests: int
