"""Log lines: one per event, for people or as JSON."""

from __future__ import annotations

import json
import logging
import time

__all__ = ["configure_logging"]


def configure_logging(level: str, log_format: str, process: str = "") -> None:
    """Send this package's log to standard error. level: a name such as info; log_format: text or json.

    process: which of a server's processes speaks, where there are several.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter(process) if log_format == "json" else _TextFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


class _TextFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        speaker = f"{process} " if process else ""
        super().__init__(f"%(asctime)s.%(msecs)03dZ %(levelname)s {speaker}%(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        # A traceback stays on its event's line: whatever collects the log takes a line for an event.
        return super().format(record).replace("\n", "\\n")


class _JsonFormatter(_TextFormatter):
    def format(self, record: logging.LogRecord) -> str:
        event = {
            "time": f"{self.formatTime(record, self.datefmt)}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self.process:
            event["process"] = self.process
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event)
