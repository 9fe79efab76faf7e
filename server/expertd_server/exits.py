"""What a process of this server says when it ends, and how it ends whatever its threads are doing.

Exit codes: 0 done; 1 it failed on the way, or hangs, the last lines of standard error say why, or what was asked about
is not as it should be; 2 the command line, an option or the checkpoint cannot be used; 3 stopped with something still
in flight after shutdown_grace_s.
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

__all__ = ["EXIT_CUT_OFF", "EXIT_FAILED", "EXIT_UNUSABLE", "end_after", "end_hung", "end_with", "exit_code_of"]

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


def end_with(run: Callable[[], int]) -> NoReturn:
    """End this process with the exit code of what is run, see `exit_code_of`, whatever its threads are still doing.

    All that matters has to be closed by then: what is registered for Python's exit is not called.
    """
    code = EXIT_FAILED
    try:
        code = exit_code_of(run)
    except BaseException:
        traceback.print_exc()
    finally:
        _end(code)


def end_after(timeout_s: float, code: int) -> None:
    """End this process after that time, unless it has ended before: it has no more."""
    impatience = threading.Timer(timeout_s, os._exit, (code,))
    impatience.daemon = True
    impatience.start()


def end_hung(close: Callable[[], object], close_timeout_s: float = _CLOSE_S) -> NoReturn:
    """End this process, in which something hangs: close what can be closed, then leave without Python's own goodbyes.

    NOTE: those of the CUDA driver would wait for what hangs; and so may `close`, if that holds a lock.
    """
    end_after(close_timeout_s, EXIT_FAILED)
    try:
        close()
    except Exception:
        traceback.print_exc()
    finally:
        _end(EXIT_FAILED)


def _end(code: int) -> NoReturn:
    """NOTE: not sys.exit, which waits for every thread of every pool and for all that such a pool has queued."""
    for stream in (sys.stdout, sys.stderr):  # the log is written to the latter
        with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
            stream.flush()
    os._exit(code)


def _complain(error: Exception, code: int) -> int:
    print(f"expertd-server: {error}", file=sys.stderr, flush=True)
    return code
