"""The ready file: one line of JSON for launchers, there exactly while the server answers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from expertd_server.errors import ConfigError

__all__ = ["clear_ready_file", "target_of", "write_ready_file"]


def clear_ready_file(path: Path) -> None:
    """Remove what an earlier process left. Raises ConfigError where the file could not be written later."""
    if not os.access(path.parent, os.W_OK | os.X_OK) or path.is_dir():
        raise ConfigError(f"ready_file is {path}, expected a file in a directory that this process may write to")
    path.unlink(missing_ok=True)


def target_of(host: str, port: int) -> str:
    """What a client dials: an IPv6 address stands in brackets there."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def write_ready_file(path: Path, facts: Mapping[str, object]) -> None:
    """Whole or not at all: a launcher that sees the file can read it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(facts) + "\n")
    partial.replace(path)
