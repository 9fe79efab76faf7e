"""A client of bench_service.py, run by a test in place of a process."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from _load import Gate, Job, Record

__all__ = ["a_job", "open_for", "while_it_asks"]

_PATIENCE_S = 30.0


def a_job(
    transport: str,
    in_flight: int,
    rate: float | None = None,
    *,
    target: str = "",
    method: str = "",
    layers: tuple[str, ...] = (),
    shape: dict[str, int] | None = None,
) -> Job:
    """Of one stream."""
    return Job(
        target=target,
        method=method,
        transport=transport,
        layers=list(layers),
        shape=shape or {},
        streams=1,
        in_flight=in_flight,
        rate=rate,
        warmup_s=0.0,
        seed=0,
        result_file="",
    )


@contextlib.contextmanager
def while_it_asks(ask: Callable[[Record, Gate], object]) -> Iterator[tuple[Record, Gate]]:
    """What a stream notes and where it waits for the clock, from its start to its end."""
    record, gate = Record(), Gate()
    thread = threading.Thread(target=ask, args=(record, gate))
    thread.start()
    try:
        yield record, gate
    finally:
        thread.join(_PATIENCE_S)
        assert not thread.is_alive()


def open_for(seconds: float, job: Job, gate: Gate) -> None:
    """Let the clock begin now."""
    job.begin_s = time.monotonic()
    job.end_s = job.begin_s + seconds
    gate.open()
