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

    @property
    def numbers(self) -> tuple[int, int, int, int, int, int]:
        """All of them, in the order of the proto's Timing, as the compiled modules and blocks take them."""
        return (
            self.queue_us,
            self.copy_in_us,
            self.compute_us,
            self.copy_out_us,
            self.batch_tokens,
            self.batch_requests,
        )
