"""Notices work that never ends: a kernel that hangs, a thread that waits for what never comes. Knows neither torch nor
gRPC.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Final

__all__ = ["Watchdog", "stacks_of"]

log = logging.getLogger(__name__)

_LOOKS: Final = 10
"""How often it looks until it gives up on something."""
_MIN_PAUSE_S: Final = 0.01
_MAX_PAUSE_S: Final = 1.0
_STOP_TIMEOUT_S: Final = 10.0
# Of each thread, in a log line.
_MOST_FRAMES: Final = 6


class Watchdog:
    """Looks, in a thread of its own, whether the oldest work has been the same for longer than timeout_s.

    oldest: the number of what has been under way the longest, None: nothing is. No two pieces of work share one.
    on_hang: called once, with that number and the seconds; then the thread ends.
    clock: seconds, monotonic. A process that stood still, or slept with its machine, is not to blame: between two looks
    no more time counts than two pauses.
    """

    def __init__(
        self,
        oldest: Callable[[], int | None],
        timeout_s: float,
        on_hang: Callable[[int, float], object],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._oldest = oldest
        self._timeout_s = timeout_s
        self._on_hang = on_hang
        self._clock = clock
        self.pause_s = min(max(timeout_s / _LOOKS, _MIN_PAUSE_S), _MAX_PAUSE_S)
        """Between two looks."""
        self._seen: int | None = None
        self._seen_s = 0.0
        """How long."""
        self._looked_at_s = clock()
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expertd-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; of no effect in its own thread, where `on_hang` may ask for it, and before `start`."""
        self._is_stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_STOP_TIMEOUT_S)

    def look(self) -> bool:
        """Look once; whether something hangs. The thread is a loop around this, tests call it themselves."""
        now_s, oldest = self._clock(), self._oldest()
        passed_s, self._looked_at_s = min(now_s - self._looked_at_s, 2 * self.pause_s), now_s
        is_same = oldest is not None and oldest == self._seen
        self._seen, self._seen_s = oldest, self._seen_s + passed_s if is_same else 0.0
        if oldest is None or self._seen_s < self._timeout_s:
            return False
        self._on_hang(oldest, self._seen_s)
        return True

    def _run(self) -> None:
        try:
            while not self._is_stopped.wait(self.pause_s):
                if self.look():
                    return
        except Exception:
            log.exception("the watchdog failed, and nobody looks after the engine any more")


def stacks_of(threads: Iterable[threading.Thread]) -> str:
    """Where these threads are, a line each, innermost call first."""
    frames = sys._current_frames()
    lines = []
    for thread in threads:
        frame = frames.get(thread.ident or 0)
        if frame is not None:
            calls = traceback.extract_stack(frame)[: -_MOST_FRAMES - 1 : -1]
            where = " < ".join(f"{call.name} ({call.filename.rpartition('/')[2]}:{call.lineno})" for call in calls)
            lines.append(f"{thread.name}: {where}")
    return "\n".join(lines)
