"""Two shards with two replicas each, in containers, under the worker's load: what happens when one of them goes.

The worker sends the same requests over and over and counts an answer whose bits differ from the first one of its
version of the weights as wrong, so `outcomes` says both that nothing failed and that nothing changed. How long things
take is measured by benchmarks/bench_faults.py, not here.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from stack import ROOT, SHARDS, Stack

from expertd_server.config import ENV_PREFIX

pytestmark = pytest.mark.timeout(900)  # the first test builds the image

REQUEST_TIMEOUT_S = 20  # of deploy/worker.py
GPU_FILES = ("docker-compose.yml", "docker-compose.gpu.yml")


@pytest.fixture(scope="module")
def gpu_services(docker_environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What Compose makes of the stack and the override for GPUs; nothing of it runs."""
    files = [part for name in GPU_FILES for part in ("-f", str(ROOT / "deploy" / name))]
    environment = {name: value for name, value in docker_environment.items() if not name.startswith(ENV_PREFIX)}
    resolved = Stack(environment).docker("compose", *files, "config", "--format", "json")
    services: dict[str, dict[str, Any]] = json.loads(resolved)["services"]
    return services


def test_the_override_gives_every_server_a_gpu(gpu_services: dict[str, dict[str, Any]]) -> None:
    experts = Counter(each["environment"].get("EXPERTD_EXPERTS") for each in gpu_services.values())
    assert experts == {"0-3": 2, "4-7": 2, None: 1}, "the servers of before, and the worker"
    for name, service in gpu_services.items():
        is_server = "EXPERTD_EXPERTS" in service["environment"]
        assert (service["environment"].get("EXPERTD_DEVICE") == "cuda") == is_server, name
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        assert [device["capabilities"] for device in devices] == [["gpu"]] * is_server, name


def test_whoever_builds_the_image_for_gpus_builds_the_same(gpu_services: dict[str, dict[str, Any]]) -> None:
    """All services share its name: one that is built otherwise would replace it."""
    builds = {name: service["build"]["args"] for name, service in gpu_services.items()}
    assert all(build == {"EXPERTD_CUDA": "on"} for build in builds.values()), builds


def run_load(stack: Stack, seconds: float) -> dict[str, int]:
    """Outcomes that were added while the load ran on for some seconds."""
    before = stack.outcomes()
    time.sleep(seconds)
    return dict(stack.outcomes() - before)


def test_every_container_is_healthy_and_answers(stack: Stack) -> None:
    for service in SHARDS:
        stack.wait_healthy(service)
    gained = run_load(stack, 3)
    assert set(gained) == {"ok"}, (gained, stack.errors())


def test_containers_run_as_an_ordinary_user(stack: Stack) -> None:
    assert stack.python("shard-0-a", "import os; print(os.getuid())").strip() == "10001"


def test_image_says_how_to_stop_it_and_how_to_see_its_health(stack: Stack) -> None:
    (image,) = json.loads(stack.docker("image", "inspect", "expertd-server:local"))
    assert image["Config"]["StopSignal"] == "SIGTERM"
    assert image["Config"]["Healthcheck"]["Test"] == ["CMD", "expertd-server", "health"]


def prometheus(stack: Stack, *paths: str) -> list[Any]:
    """What Prometheus answers to some requests of its HTTP interface."""
    bodies = stack.get("prometheus", *(f"http://127.0.0.1:9090/api/v1/{path}" for path in paths))
    answers = [json.loads(body) for body in bodies]
    assert all(answer["status"] == "success" for answer in answers), answers
    return [answer["data"] for answer in answers]


def samples_of(stack: Stack, *queries: str) -> list[list[dict[str, Any]]]:
    """The present samples of each query."""
    return [data["result"] for data in prometheus(stack, *(f"query?query={quote(query)}" for query in queries))]


def wait_for_samples(stack: Stack, query: str, count: int) -> list[dict[str, Any]]:
    """The query's samples, once there are so many."""
    until_s = time.monotonic() + 60
    while len(samples := samples_of(stack, query)[0]) != count:
        assert time.monotonic() < until_s, f"{query}: {samples}, targets: {prometheus(stack, 'targets')}"
        time.sleep(0.5)
    return samples


def test_prometheus_scrapes_every_server_and_the_worker(stack: Stack) -> None:
    up = wait_for_samples(stack, "up == 1", len(SHARDS) + 1)
    assert {sample["metric"]["instance"] for sample in up} == {
        *(f"{service}:9090" for service in SHARDS),
        "worker:9091",
    }
    served = wait_for_samples(stack, 'sum by (instance) (expertd_requests_total{code="OK"}) > 0', len(SHARDS))
    assert all(float(sample["value"][1]) > 0 for sample in served), served
    wait_for_samples(stack, 'expertd_client_requests_total{outcome="ok"} > 0', 1)


def test_alert_rules_are_loaded_and_evaluate(stack: Stack) -> None:
    wanted = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    until_s = time.monotonic() + 30
    while True:
        (loaded,) = prometheus(stack, "rules")
        rules = [rule for group in loaded["groups"] for rule in group["rules"]]
        if all(rule["health"] == "ok" for rule in rules):
            break
        assert all(rule["health"] != "err" for rule in rules), rules
        assert time.monotonic() < until_s, rules
        time.sleep(0.5)
    assert [rule["name"] for rule in rules] == [rule["alert"] for group in wanted for rule in group["rules"]]


def dashboard_queries() -> list[str]:
    """Every query of the dashboard, with its variables filled in as Grafana would."""
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/expertd.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return [query.replace("$instance", ".*").replace("$__rate_interval", "30s") for query in queries]


def test_dashboard_queries_have_answers(stack: Stack) -> None:
    """Every panel shows something, but the one of refused requests: there are none."""
    queries = dashboard_queries()
    assert queries
    assert not any("$" in query for query in queries)
    empty = [query for query, samples in zip(queries, samples_of(stack, *queries), strict=True) if not samples]
    assert empty == [query for query in queries if "RESOURCE_EXHAUSTED" in query]


def test_kill_of_one_replica_fails_no_request(stack: Stack) -> None:
    stack.docker("kill", "--signal", "KILL", stack.container("shard-0-a"))
    gained = run_load(stack, 5)
    assert set(gained) == {"ok"}, (gained, stack.errors())
    stack.compose("start", "shard-0-a")
    stack.wait_used()


def test_pause_of_one_replica_fails_no_request(stack: Stack) -> None:
    """A paused container keeps its connections and says nothing: no FIN tells anybody."""
    container = stack.container("shard-1-b")
    stack.docker("pause", container)
    try:
        gained = run_load(stack, 6)
    finally:
        stack.docker("unpause", container)
    assert set(gained) == {"ok"}, (gained, stack.errors())
    stack.wait_used()


def test_rolling_restart_fails_no_request(stack: Stack) -> None:
    before = stack.outcomes()
    for replica in ("a", "b"):  # of both shards at once
        stack.compose("restart", "--timeout", "35", f"shard-0-{replica}", f"shard-1-{replica}")
        # The other replicas go only when the worker uses these again.
        stack.wait_used()
    gained = dict(stack.outcomes() - before)
    assert set(gained) == {"ok"}, (gained, stack.errors())


def test_new_weights_under_load_fail_no_request_and_mix_no_versions(stack: Stack) -> None:
    """There and back. Before, between and after, one version alone is held: the bits of pure answers are known."""
    layers = ("synthetic.tiny.0", "synthetic.tiny.1")
    before, answers = stack.outcomes(), stack.answers()
    assert set(answers) == {1}
    for version, old in (("2", "1"), ("1", "2")):
        for index, layer in enumerate(layers):
            source = ("--synthetic", "tiny", "--layer-index", str(index), "--seed", str(int(version) - 1))
            stack.order("load", layer, "--version", version, *source)
        stack.order("swap", *layers, "--version", version)
        stack.order("unload", *layers, "--version", old)
        alone = stack.answers()
        run_load(stack, 2)
        gained = stack.answers() - alone
        assert gained[int(version)] > 8 * len(layers), gained
        assert set(gained) == {int(version)}, gained
    gained = dict(stack.outcomes() - before)
    assert set(gained) == {"ok"}, (gained, stack.errors())


def test_stop_drains_and_exits_with_0(stack: Stack) -> None:
    container = stack.container("shard-0-b")
    stack.compose("stop", "--timeout", "35", "shard-0-b")
    state = json.loads(stack.docker("inspect", "--format", "{{json .State}}", container))
    assert state["ExitCode"] == 0, stack.compose("logs", "--tail", "30", "shard-0-b")
    gained = run_load(stack, 3)
    assert set(gained) == {"ok"}, (gained, stack.errors())


def test_no_request_failed_in_all_this_time(stack: Stack) -> None:
    """Between the tests above neither: while a container that was killed joins again, or is let go on."""
    stack.wait_answered(REQUEST_TIMEOUT_S + 1)  # one that hangs is counted when the worker gives it up
    assert set(stack.outcomes()) == {"ok"}, (stack.outcomes(), stack.errors())
