"""The compiled modules of the data path: `pip install` builds them where there is a C++ compiler.

Where they were not built, Python does the same work. Nothing else imports them.
"""

from __future__ import annotations

try:
    from expertd_server import _codec as CODEC  # noqa: N812
except ImportError:
    CODEC = None  # type: ignore[assignment]
try:
    from expertd_server import _blocks as BLOCKS  # noqa: N812
except ImportError:
    BLOCKS = None  # type: ignore[assignment]

__all__ = ["BLOCKS", "CODEC", "describe"]


def describe() -> str:
    """Who reads requests here, for a log line."""
    if CODEC is None or BLOCKS is None:
        return "Python (the compiled codec is missing; install where there is a C++ compiler)"
    return "the compiled codec"
