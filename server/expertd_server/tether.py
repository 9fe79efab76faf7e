"""`python -m expertd_server.tether PARENT COMMAND...`: become COMMAND, which gets SIGTERM when the parent ends.

However the parent ends, SIGKILL included, the server that it started drains and goes; nobody else would stop it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["main", "tethered"]

_PR_SET_PDEATHSIG = 1


def tethered(command: list[str]) -> list[str]:
    """The command line that runs `command` until the calling thread ends, at the latest."""
    return [sys.executable, "-m", "expertd_server.tether", str(os.getpid()), *command]


def main(arguments: list[str]) -> None:
    """Does not return."""
    parent, command = int(arguments[0]), arguments[1:]
    # The kernel keeps this across exec, and forgets it for children.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before the kernel was told
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
