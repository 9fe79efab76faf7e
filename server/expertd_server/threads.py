"""The end of threads that were told to end."""

from __future__ import annotations

import logging
import threading
from typing import Final

__all__ = ["ended"]

log = logging.getLogger(__name__)

# Far longer than it takes them to hear of it, and less than a process may take to close down.
_END_S: Final = 2.0


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
