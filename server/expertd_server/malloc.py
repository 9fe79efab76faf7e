"""glibc malloc settings for messages of megabytes, put in place before they are needed.

By default glibc maps every block above 128 KiB anew and gives it back at once, so that each large message pays for page
faults over its whole length: an answer of 0.5 MB then takes a millisecond longer, one of 4 MB six. glibc reads the
settings once, when a process starts, so the launcher executes itself again with them in the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Final

__all__ = ["SETTINGS", "reexec_with_settings"]

SETTINGS: Final[Mapping[str, str]] = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),  # allocate messages in the heap, where their pages stay mapped
    "MALLOC_TRIM_THRESHOLD_": str(2**32),  # give memory back only beyond 4 GiB of it free
    "MALLOC_TOP_PAD_": str(2**26),  # grow the heap by 64 MiB at a time
}


def reexec_with_settings() -> None:
    """Start this process over with the settings, unless they or others of the user's are there already.

    Call it before anything large is imported. Does nothing where the C library is not glibc. The process keeps its id,
    arguments and open standard files.
    """
    if not _is_glibc() or any(name in os.environ for name in SETTINGS):
        return
    os.environ.update(SETTINGS)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):
        return False
