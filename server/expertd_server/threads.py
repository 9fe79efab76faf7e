"""Where threads run, and the end of those that were told to end."""

from __future__ import annotations

import logging
import os
import threading
from typing import Final

__all__ = ["core_of", "ended"]

log = logging.getLogger(__name__)

# Far longer than it takes them to hear of it, and less than a process may take to close down.
_END_S: Final = 2.0


def core_of(number: int) -> int:
    """The core of what has this number among those of a kind, from the last on that this process may use: the first
    have the most to do for others."""
    cores = sorted(os.sched_getaffinity(os.getpid()))  # its first thread's, which stays on none
    return cores[-1 - number % len(cores)]


def ended(thread: threading.Thread) -> bool:
    """Wait for a thread that was told to end, or was never started; False, and a line in the log, when it does not.

    What it uses must not be closed then. It is for the process to end all the same: such threads are daemons.
    """
    if thread.ident is None:
        return True
    thread.join(_END_S)
    if thread.is_alive():
        log.warning("thread %s has not ended after %.1f s, and is left behind", thread.name, _END_S)
    return not thread.is_alive()
