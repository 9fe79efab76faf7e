"""How often the interpreter looks for garbage, for processes that serve."""

from __future__ import annotations

import gc
from typing import Final

__all__ = ["look_rarely"]

# The first number counts objects that came less those that went. A batch of requests coming and going is thousands of
# them, none in a cycle: with Python's 700 all that is in flight is looked through several times a batch, which took a
# third to a half of an engine's time where many were. What errors leave in cycles, if anything, waits for as many.
_THRESHOLDS: Final = (10_000, 10, 100)


def look_rarely() -> None:
    """To be called once, when everything is imported and nothing was made yet."""
    gc.freeze()  # what was imported stays: looking through torch for garbage takes tens of milliseconds
    gc.set_threshold(*_THRESHOLDS)
