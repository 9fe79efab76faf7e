"""Two shards with two replicas each, in containers, under the worker's load: what happens when one of them goes.

The worker sends the same requests over and over and counts an answer whose bits differ from the first one as wrong, so
`outcomes` says both that nothing failed and that nothing changed.
"""

from __future__ import annotations

import json
import time

import pytest
from stack import SHARDS, Stack

pytestmark = pytest.mark.timeout(900)  # the first test builds the image


def outcomes(stack: Stack) -> dict[str, int]:
    """Requests of the worker so far, by outcome."""
    totals = [report["totals"] for report in stack.reports() if "totals" in report]
    return dict(totals[-1]) if totals else {}  # type: ignore[call-overload,no-any-return]


def run_load(stack: Stack, seconds: float) -> dict[str, int]:
    """Outcomes that were added while the load ran on for some seconds."""
    before = outcomes(stack)
    time.sleep(seconds)
    after = outcomes(stack)
    return {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}


def failures(stack: Stack) -> list[dict[str, object]]:
    """What the worker printed about requests that failed."""
    return [report for report in stack.reports() if "error" in report]


def test_every_container_is_healthy_and_answers(stack: Stack) -> None:
    for service in SHARDS:
        stack.wait_healthy(service)
    gained = run_load(stack, 4)
    assert set(gained) == {"ok"}, (gained, failures(stack))
    assert gained["ok"] > 20


def test_containers_run_as_an_ordinary_user(stack: Stack) -> None:
    assert stack.python("shard-0-a", "import os; print(os.getuid())").strip() == "10001"


def test_metrics_count_the_work(stack: Stack) -> None:
    code = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:9090/metrics').read().decode())"
    for service in ("shard-0-a", "shard-1-a"):
        text = stack.python(service, code)
        counts = [
            line for line in text.splitlines() if line.startswith("expertd_requests_total") and 'code="OK"' in line
        ]
        assert sum(float(line.rsplit(" ", 1)[1]) for line in counts) > 0, counts


def test_kill_of_one_replica_fails_no_request(stack: Stack) -> None:
    stack.docker("kill", "--signal", "KILL", stack.container("shard-0-a"))
    gained = run_load(stack, 6)
    assert set(gained) == {"ok"}, (gained, failures(stack))
    stack.compose("up", "--detach", "--no-build", "--no-deps", "shard-0-a")
    stack.wait_healthy("shard-0-a")


def test_pause_of_one_replica_fails_no_request(stack: Stack) -> None:
    """A paused container keeps its connections and says nothing: no FIN tells anybody."""
    container = stack.container("shard-1-b")
    stack.docker("pause", container)
    try:
        gained = run_load(stack, 8)
    finally:
        stack.docker("unpause", container)
    assert set(gained) == {"ok"}, (gained, failures(stack))
    stack.wait_healthy("shard-1-b")


def test_rolling_restart_fails_no_request(stack: Stack) -> None:
    before = outcomes(stack)
    for service in SHARDS:
        stack.compose("restart", "--timeout", "35", service)
        stack.wait_healthy(service)
        # The other replica goes only after the worker has had time to find this one again.
        time.sleep(3)
    after = outcomes(stack)
    assert set(after) == {"ok"}, (after, failures(stack))
    assert after["ok"] > before["ok"]


def test_stop_drains_and_exits_with_0(stack: Stack) -> None:
    container = stack.container("shard-0-b")
    stack.compose("stop", "--timeout", "35", "shard-0-b")
    state = json.loads(stack.docker("inspect", "--format", "{{json .State}}", container))
    assert state["ExitCode"] == 0, stack.compose("logs", "--tail", "30", "shard-0-b")
    gained = run_load(stack, 3)
    assert set(gained) == {"ok"}, (gained, failures(stack))
