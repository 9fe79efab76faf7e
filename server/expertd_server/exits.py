"""What a process of this server says when it ends.

Exit codes: 0 done; 1 it failed on the way, or hangs, the last lines of standard error say why; 2 the command line, an
option or the checkpoint cannot be used; 3 stopped with requests still in flight after shutdown_grace_s.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Final, NoReturn

from expertd_server.errors import CheckpointError, ConfigError, ExpertdServerError

__all__ = ["EXIT_CUT_OFF", "EXIT_FAILED", "EXIT_UNUSABLE", "end_hung", "exit_code_of"]

EXIT_FAILED: Final = 1
EXIT_UNUSABLE: Final = 2
EXIT_CUT_OFF: Final = 3

# What is left to callers of a process that hangs, to read that it does.
_CLOSE_S: Final = 10.0


def exit_code_of(run: Callable[[], int]) -> int:
    """Run something, and turn what it raises on purpose into one line on standard error and an exit code."""
    try:
        return run()
    except (ConfigError, CheckpointError) as error:
        return _complain(error, EXIT_UNUSABLE)
    except (ExpertdServerError, OSError) as error:
        return _complain(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return 130


def end_hung(close: Callable[[], object], close_timeout_s: float = _CLOSE_S) -> NoReturn:
    """End this process, in which something hangs: close what can be closed, then leave without Python's own goodbyes.

    NOTE: those of the CUDA driver would wait for what hangs; and so may `close`, if that holds a lock.
    """
    impatience = threading.Timer(close_timeout_s, os._exit, (EXIT_FAILED,))
    impatience.daemon = True
    impatience.start()
    try:
        close()
    except Exception:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
                stream.flush()
        os._exit(EXIT_FAILED)


def _complain(error: Exception, code: int) -> int:
    print(f"expertd-server: {error}", file=sys.stderr, flush=True)
    return code
