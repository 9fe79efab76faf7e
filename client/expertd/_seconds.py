"""Times that can be waited for."""

from __future__ import annotations

from typing import Final

from expertd.errors import ConfigError, InvalidRequestError

__all__ = ["MAX_TIMEOUT_S", "check_seconds", "checked_timeout_s"]

MAX_TIMEOUT_S: Final = 1e9
"""Thirty years: gRPC and the interpreter count no further than some hundred."""


def check_seconds(name: str, value: float, most: float = MAX_TIMEOUT_S) -> None:
    """Raise ConfigError unless an option is a time that can be waited for."""
    if not 0 < value <= most:
        raise ConfigError(f"{name} is {value}, expected a positive number of seconds, at most {most:.0f}")


def checked_timeout_s(timeout_s: float) -> float:
    """The caller's timeout. Raises InvalidRequestError when it cannot be waited for."""
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequestError.of(
            "timeout_s", f"is {timeout_s}, expected a positive number of seconds, at most {MAX_TIMEOUT_S:.0f}"
        )
    return timeout_s
