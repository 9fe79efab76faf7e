"""Programs of benchmarks/ follow what they drive: parts of a server without gRPC, and servers as clients of theirs."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from bench_client import a_job, open_for, while_it_asks
from serving import HIDDEN_SIZE, LAYER, NUM_EXPERTS, running

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _load import due_times, run_one

PROGRAMS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("program", "options", "expected"),
    [
        ("bench_frontends.py", ["--tokens", "1", "--count", "5", "--rounds", "1"], "1 tokens: front-end"),
        ("bench_gate.py", ["--tokens", "3", "--in-flight", "4", "--seconds", "0.1", "--rounds", "1"], "req/batch"),
        (
            "bench_gate.py",
            ["--regions", "--tokens", "3", "--in-flight", "4", "--seconds", "0.1", "--rounds", "1"],
            "caller's memory",
        ),
        ("bench_engine_host.py", ["--tokens", "3", "--in-flight", "4", "--seconds", "0.1", "--rounds", "1"], "req/s"),
    ],
)
def test_it_runs(program: str, options: list[str], expected: str) -> None:
    options = options if program == "bench_frontends.py" else [*options, "--layers", "2"]
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / program), *options], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.mark.parametrize("rate", [None, 200.0])
@pytest.mark.parametrize("transport", ["sdk-shm-prepared", "sdk-shm-inplace", "sdk-stream", "stream"])
def test_a_client_of_bench_service_has_an_answer_to_all_that_is_due(transport: str, rate: float | None) -> None:
    with running() as server:
        job = a_job(
            transport,
            4 if rate is None else 20,
            rate,
            target=f"127.0.0.1:{server.server.port}",
            method="/expertd.v1.ExpertService/ForwardStream",
            layers=(LAYER,),
            shape={"num_tokens": 2, "hidden_size": HIDDEN_SIZE, "num_experts": NUM_EXPERTS},
        )
        with while_it_asks(partial(run_one, job, 0)) as (record, gate):
            gate.wait_arrived(1)
            open_for(0.5, job, gate)
    assert record.errors == {}
    assert record.times
    assert all(job.begin_s <= due_s <= done_s for due_s, done_s in record.times)
    if rate is not None:
        assert sorted(due_s for due_s, _ in record.times) == list(due_times(job, 0))
