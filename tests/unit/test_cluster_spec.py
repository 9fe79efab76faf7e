"""What a tier is made of, the statistics of its servers, and the flags that they are started with."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from expertd.topology import TopologyFile
from expertd_server.cli import main
from expertd_server.cluster_server import ServerStats, ServerStatus, parse_stats, says_serving
from expertd_server.cluster_spec import SET_BY_THE_CLUSTER, ClusterSpec, write_prometheus_targets, write_topology
from expertd_server.config import Config, add_flags, command_line, config_from
from expertd_server.errors import ConfigError
from expertd_server.metrics import Metrics

pytest.importorskip("ray", reason="needs Ray: pip install 'expertd-server[ray]'")
from expertd_server import cluster
from expertd_server.cluster_replica import Replica, shard_loads

SPEC = ClusterSpec(
    name="expertd",
    num_experts=10,
    shards=4,
    replicas=2,
    min_replicas=1,
    max_replicas=4,
    cpus_per_shard=1,
    gpus_per_shard=0,
    topology_file=None,
    prometheus_file=None,
    rebalance=True,
    serve_flags=("--synthetic", "tiny"),
    max_queue_tokens=100,
    shutdown_grace_s=30,
)


def test_shards_cover_the_experts_once() -> None:
    assert [SPEC.experts(shard) for shard in range(4)] == [range(2), range(2, 5), range(5, 7), range(7, 10)]
    assert SPEC.server_flags(1) == ["--synthetic", "tiny", "--experts", "2-4", "--expert-token-metrics"]


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "a.b"},
        {"shards": 11},
        {"shards": 0},
        {"replicas": 0},
        {"min_replicas": 0},
        {"max_replicas": 0},
        {"cpus_per_shard": -1},
        {"gpus_per_shard": float("nan")},
        {"interval_s": 0},
        {"start_timeout_s": 0},
    ],
)
def test_values_that_cannot_be_used_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        dataclasses.replace(SPEC, **fields)


def test_a_server_without_resources_still_has_a_place() -> None:
    assert SPEC.resources == {"CPU": 1}
    assert dataclasses.replace(SPEC, cpus_per_shard=0).resources == {"memory": 1.0}


def test_a_group_reads_the_topology_that_is_written(tmp_path: Path) -> None:
    path = tmp_path / "experts.json"
    write_topology(path, ["127.0.0.1:5", "127.0.0.2:6"])
    assert TopologyFile(path).resolve() == ["127.0.0.1:5", "127.0.0.2:6"]
    assert json.loads(path.read_text())["expertd_topology"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_prometheus_reads_targets_with_their_shard(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    write_prometheus_targets(path, "expertd", [("10.0.0.7:9", 3)])
    assert json.loads(path.read_text()) == [{"targets": ["10.0.0.7:9"], "labels": {"tier": "expertd", "shard": "3"}}]


def test_flags_say_what_the_options_are() -> None:
    config = Config(synthetic="tiny", layers=(), reflection=False, max_batch_tokens=7, expert_token_metrics=True)
    flags = command_line(config)
    assert flags == ["--synthetic", "tiny", "--no-reflection", "--max-batch-tokens", "7", "--expert-token-metrics"]
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert config_from(vars(parser.parse_args(flags)), {}) == config


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), 'ExpertGroup("/t.json")'),
        (("--tls-cert-file", "c"), 'partial(expertd.ClientConfig, ca_file="...", server_name="..."))'),
        (("--tls-cert-file", "c", "--tls-client-ca-file", "a"), 'cert_file="...", key_file="..."))'),
    ],
)
def test_up_tells_workers_what_they_need(flags: tuple[str, ...], says: str) -> None:
    spec = dataclasses.replace(SPEC, serve_flags=flags, topology_file=Path("/t.json"))
    assert spec.is_tls == bool(flags)
    assert says in cluster._usage(spec)


def test_what_the_cluster_sets_is_a_field_of_the_options() -> None:
    assert set(SET_BY_THE_CLUSTER) <= {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "2"], "--checkpoint or --synthetic"),
        (["--shards", "9", "--synthetic", "tiny"], "shards is 9, expected 1 to the 8 experts"),
        (["--shards", "2", "--synthetic", "tiny", "--experts", "0-3"], "--experts is set"),
        (["--shards", "2", "--synthetic", "tiny", "--admin-port", "7"], "--admin-port is set"),
        (["--shards", "2", "--synthetic", "tiny", "--max-streams", "many"], "--max-streams is 'many'"),
        (["--shards", "2", "--checkpoint", "/no/such/checkpoint"], "/no/such/checkpoint does not exist"),
    ],
)
def test_bad_options_are_refused_before_ray_is_asked(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", "up", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_ray_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["cluster", "status"]) == 2
    assert "pip install 'expertd-server[ray]'" in capsys.readouterr().err


def test_statistics_are_read_from_the_metrics_of_a_server() -> None:
    metrics = Metrics(count_expert_tokens=True)
    for name in ("a", "b"):
        metrics.count_experts(name, 4, 2)
    import numpy as np
    from prometheus_client import generate_latest

    assert not says_serving(generate_latest(metrics.registry).decode())
    metrics.serving.set(1)
    assert says_serving(generate_latest(metrics.registry).decode())
    metrics.watch_queue(lambda: 12, lambda: 3)
    metrics.observe_batch("a", 1, 3, [np.array([[4], [4], [5]])])
    metrics.observe_batch("b", 1, 1, [np.array([[4]])])
    metrics.observe_device(0.25, 4, None)
    stats = parse_stats(generate_latest(metrics.registry).decode())
    assert stats == ServerStats(tokens=4, busy_s=0.25, queue_tokens=12, expert_tokens={4: 3, 5: 1})


def status(at_s: float, instance: str = "one", **stats: Any) -> ServerStatus:
    return ServerStatus(state="serving", address="h:1", instance_id=instance, at_s=at_s, stats=ServerStats(**stats))


def replica(shard: int, *history: ServerStatus) -> Replica:
    result = Replica(f"expertd.s{shard}.g{shard}.0", None, shard, (f"expertd.g{shard}", 0))
    for each in history:
        result.take(("node", "10.0.0.1", each))
    return result


class TestRates:
    def test_are_differences_over_the_servers_own_time(self) -> None:
        first = status(10.0, tokens=100, busy_s=1.0, expert_tokens={0: 50})
        last = status(12.0, tokens=300, busy_s=2.0, queue_tokens=7, expert_tokens={0: 60, 1: 90})
        assert replica(0, first, last).rates() == ServerStats(100.0, 0.5, 7, {0: 5.0, 1: 45.0})

    def test_a_server_that_was_started_again_counts_from_there(self) -> None:
        assert replica(0, status(10.0, tokens=900), status(11.0, "two", tokens=3)).rates().tokens == 0.0

    def test_old_answers_are_forgotten(self) -> None:
        rates = replica(0, *(status(float(t), tokens=100.0 if t == 0 else 100.0 + t) for t in range(20))).rates()
        assert rates.tokens == 1.0

    def test_shards_sum_their_replicas_and_name_the_hottest_expert(self) -> None:
        pair = [status(0.0), status(1.0, busy_s=0.5, queue_tokens=3, expert_tokens={0: 30, 1: 10})]
        silent = replica(0, *pair)
        silent.is_reachable = False
        leaving = replica(0, *pair)
        leaving.is_retiring = True
        replicas = [replica(0, *pair), replica(0, *pair), silent, leaving]
        loads = shard_loads(dataclasses.replace(SPEC, shards=2), replicas)
        assert (loads[0].num_replicas, loads[0].num_starting) == (2, 1)
        assert loads[0].busy_servers == 1.0
        assert loads[0].queue_tokens == 6
        assert (loads[0].hottest_expert, loads[0].hottest_share) == (0, 0.75)
        assert loads[1].num_replicas == 0
