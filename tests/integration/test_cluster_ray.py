"""A tier on a Ray cluster of three nodes on this machine: up, requests, faults, moves, down. Nobody notices a thing.

The nodes are real raylets, each with two CPUs in its books; the servers are real `expertd-server serve` processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import psutil
import pytest

from expertd import ClientConfig, ExpertGroup, GroupConfig
from expertd.errors import TopologyError
from expertd_server.cli import main
from expertd_server.cluster_spec import NAMESPACE, ClusterSpec, controller_name

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'expertd-server[ray]'")

pytestmark = [
    pytest.mark.timeout(600),  # about a minute on two quiet cores, most of it Python processes that start
    # Ray leaves sockets and log files to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

SPEC = ClusterSpec(
    name="places",
    num_experts=8,
    shards=1,
    replicas=1,
    min_replicas=1,
    max_replicas=2,
    cpus_per_shard=1,
    gpus_per_shard=0,
    topology_file=None,
    prometheus_file=None,
    rebalance=False,
    serve_flags=(),
    max_queue_tokens=1,
    shutdown_grace_s=1,
)
CERTS = Path(__file__).parent / "certs"
SEED, NUM_TOKENS = 20261126, 16
LAYER, HIDDEN_SIZE, NUM_EXPERTS = "synthetic.tiny.0", 256, 8
HOT_SHARD, HOT_EXPERT, HOT_TOKENS = range(4), 2, 1024
PATIENCE_S = 120.0
NODE = {"num_cpus": 2, "object_store_memory": 80 << 20}
# A node that dies is noticed within two seconds; one that is slow has as long as ever.
SYSTEM = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "prestart_worker_first_driver": False,
}


def patiently(start: Callable[[], Any]) -> Any:
    """Start a node; Ray itself gives a node, and each of its processes, 30 s, which a machine that has other things to
    do, or reads Ray's programs from the disk for the first time, may exceed."""
    for attempt in range(3):
        try:
            return start()
        except Exception as error:
            was_slow = any(words in str(error) for words in ("timed out during startup", "Timed out waiting for file"))
            if attempt == 2 or not was_slow:
                raise
    return None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes; this process is connected to the first."""
    from ray.cluster_utils import Cluster

    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        head = {**NODE, "include_dashboard": False, "_system_config": SYSTEM}
        cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        try:
            for _ in range(2):
                patiently(lambda: cluster.add_node(**NODE))
            ray.init(cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that failed leaves its tier up: it must not fail the next one, too."""
    yield
    if "cluster" in request.fixturenames and ray.is_initialized():
        with contextlib.suppress(ValueError):
            ray.get_actor(controller_name("expertd"), NAMESPACE)
            main(["cluster", "down"])


class Callers:
    """Two threads that send one request again and again."""

    num_threads = 2
    pause_s = 0.02
    """Leaves the processor to the servers that start."""

    def __init__(self, group: ExpertGroup) -> None:
        random = np.random.default_rng(SEED)
        self.hidden = random.standard_normal((NUM_TOKENS, HIDDEN_SIZE), np.float32).astype(ml_dtypes.bfloat16)
        self.logits = random.standard_normal((NUM_TOKENS, NUM_EXPERTS), np.float32)
        self.group = group
        self.outputs: set[bytes] = set()
        self.failures: list[BaseException] = []
        self.latencies_s: list[float] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(self.num_threads)]

    def forward(self, group: ExpertGroup) -> bytes:
        result = group.forward(LAYER, self.hidden, routing_logits=self.logits)
        return bytes(result.output.tobytes())

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _run(self) -> None:
        while not self._stop.wait(self.pause_s):
            started_s = time.monotonic()
            try:
                self.outputs.add(self.forward(self.group))
                self.latencies_s.append(time.monotonic() - started_s)
            except BaseException as error:
                self.failures.append(error)
                return

    def summary(self, start: int) -> str:
        """What became of the requests from number `start` on."""
        times_ms = [1e3 * latency_s for latency_s in sorted(self.latencies_s[start:])]
        return (
            f"{len(self.failures)} of {len(times_ms)} requests failed, median {times_ms[len(times_ms) // 2]:.0f} ms, "
            f"slowest {times_ms[-1]:.0f} ms"
        )

    def check(self) -> None:
        """Answers keep coming, all of them the same."""
        before = len(self.latencies_s)
        wait_for(lambda: self.failures or len(self.latencies_s) >= before + 5, "five more answers")
        assert not self.failures, self.failures
        assert len(self.outputs) == 1, f"{len(self.outputs)} different answers to one request, seed {SEED}"


class HotCallers(Callers):
    """Threads without a pause, whose tokens choose experts of shard 0 alone, and all of them HOT_EXPERT."""

    num_threads = 4
    pause_s = 0.0

    def __init__(self, group: ExpertGroup) -> None:
        super().__init__(group)
        random = np.random.default_rng(SEED)
        self.hidden = random.standard_normal((HOT_TOKENS, HIDDEN_SIZE), np.float32).astype(ml_dtypes.bfloat16)
        others = random.choice([expert for expert in HOT_SHARD if expert != HOT_EXPERT], HOT_TOKENS)
        self.topk_ids = np.stack([np.full(HOT_TOKENS, HOT_EXPERT), others], axis=1).astype(np.int32)
        self.topk_weights = np.full(self.topk_ids.shape, 0.5, np.float32)

    def forward(self, group: ExpertGroup) -> bytes:
        result = group.forward(LAYER, self.hidden, topk_ids=self.topk_ids, topk_weights=self.topk_weights)
        return bytes(result.output.tobytes())


def wait_for(condition: Callable[[], Any], what: str) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s, f"never came: {what}"
        time.sleep(0.1)


def cli(action: str, *arguments: str) -> None:
    assert main(["cluster", action, *arguments]) == 0


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    main(["cluster", "status", "--json"])
    said = capsys.readouterr()
    # Ray, connected to this process for the whole test, prints what it has to say of dead nodes here as well.
    lines = [line for line in said.out.splitlines() if line.startswith("{")]
    assert lines, said.err
    document: dict[str, Any] = json.loads(lines[-1])
    return document


def nodes_of(document: dict[str, Any], shard: int) -> list[str]:
    return [replica["node"] for replica in document["replicas"] if replica["shard"] == shard]


class TestPlaces:
    """Where a controller reserves them. It runs in this process, without servers."""

    @staticmethod
    @contextlib.contextmanager
    def controller(replicas: int) -> Iterator[Any]:
        from expertd_server.cluster_actors import Controller

        controller = Controller(dataclasses.replace(SPEC, replicas=replicas))
        try:
            yield controller
        finally:
            controller.down()

    @staticmethod
    def nodes(controller: Any) -> list[str]:
        return [node for group in controller._places.groups().values() for node in group["bundles_to_node_id"].values()]

    @pytest.mark.usefixtures("cluster")
    def test_replicas_have_hosts_of_their_own_where_there_are_enough(self) -> None:
        with self.controller(3) as controller:
            controller._places.reserve_shard(0)
            assert len(set(self.nodes(controller))) == 3
            assert controller.report().notes == ()

    @pytest.mark.usefixtures("cluster")
    def test_and_share_them_with_a_warning_where_there_are_not(self) -> None:
        with self.controller(4) as controller:
            controller._places.reserve_shard(0)
            nodes = self.nodes(controller)
            assert len(nodes) == 4
            assert len(set(nodes)) == 3
            assert "replicas of shard 0 share hosts" in controller.report().notes[0]

    @pytest.mark.usefixtures("cluster")
    def test_one_more_avoids_the_hosts_that_have_one(self) -> None:
        with self.controller(2) as controller:
            controller._places.reserve_shard(0)
            taken = set(self.nodes(controller))
            assert controller._places.reserve_one(taken) == f"{SPEC.name}.g1"
            assert len(set(self.nodes(controller))) == 3

    @pytest.mark.usefixtures("cluster")
    def test_without_room_nothing_is_left_behind(self) -> None:
        from expertd_server.cluster_places import ClusterError

        with self.controller(7) as controller:
            with pytest.raises(ClusterError, match="no room for 7 replicas of shard 0: each needs 1 CPU"):
                controller._places.reserve_shard(0)
            assert controller._places.groups() == {}


def test_a_tier_outlives_its_nodes(cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from expertd.ray import RayTier

    topology = tmp_path / "experts.json"
    targets = tmp_path / "targets.json"
    options = ["--synthetic", "tiny", "--device", "cpu", "--topology-file", str(topology)]
    # Two servers on a busy core look hot; that is what another test is about.
    options += ["--no-rebalance"]
    cli("up", "--shards", "2", "--replicas", "2", "--prometheus-file", str(targets), *options)
    before = report(capsys)
    assert len(before["replicas"]) == 4
    assert {each["experts"] for each in before["replicas"]} == {"0-3", "4-7"}
    for shard in range(2):
        assert len(set(nodes_of(before, shard))) == 2, "replicas of a shard are on nodes of their own"
    assert before["notes"] == []
    assert [each["labels"]["shard"] for each in json.loads(targets.read_text())].count("1") == 2
    assert main(["cluster", "up", "--shards", "2", *options]) == 1, "there is one already"

    with ExpertGroup(topology, GroupConfig(refresh_interval_s=0.3)) as group, Callers(group) as callers:
        callers.check()
        with ExpertGroup(RayTier()) as other:
            assert {callers.forward(other)} == callers.outputs

        # A host dies: its raylet and every process on it, without a word.
        victim = next(node for node in cluster.list_all_nodes() if not node.is_head())
        lost = [each for each in before["replicas"] if each["node"].endswith(victim.node_id[:8])]
        assert lost, "the scheduler left a node empty"
        num_before, killed_s = len(callers.latencies_s), time.monotonic()
        for each in lost:
            os.kill(each["pid"], signal.SIGKILL)
        cluster.remove_node(victim, allow_graceful=False)
        wait_for(lambda: all_serve(capsys, 4, without=[each["pid"] for each in lost]), "the lost servers elsewhere")
        with capsys.disabled():
            print(f"\n{len(lost)} of 4 servers lost, back after {time.monotonic() - killed_s:.1f} s")
            print(callers.summary(num_before))
        after = report(capsys)
        assert victim.node_id[:8] not in json.dumps(after["replicas"])
        for shard in range(2):
            assert len(set(nodes_of(after, shard))) == 2
        callers.check()

        # The controller dies, and finds everything again; who asks it meanwhile waits for its answer.
        process = process_of_controller()
        ray.kill(ray.get_actor(controller_name("expertd"), NAMESPACE), no_restart=False)
        assert len(report(capsys)["replicas"]) == 4
        psutil.wait_procs([process], PATIENCE_S)
        wait_for(lambda: all_serve(capsys, 4), "the servers, of the controller after it")
        assert process_of_controller() != process
        wait_for(lambda: addresses(topology) == published(capsys), "the topology file")

        cli("move", "--source", "0", "--target", "1")
        moved = report(capsys)
        assert len(nodes_of(moved, 0)) == 1
        assert len(nodes_of(moved, 1)) == 3
        callers.check()

        cli("scale", "--shard", "1", "--replicas", "1")
        cli("scale", "--replicas", "2")
        scaled = report(capsys)
        assert [each["shard"] for each in scaled["replicas"]] == [0, 0, 1, 1]
        callers.check()
        wait_for(lambda: addresses(topology) == published(capsys), "the topology file")
        assert main(["cluster", "scale", "--shard", "0", "--replicas", "3"]) == 1, "there is no room"

    assert not callers.failures
    assert len(callers.outputs) == 1
    pids = [each["pid"] for each in report(capsys)["replicas"]]
    cli("down")
    assert not topology.exists()
    assert not targets.exists()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert main(["cluster", "status"]) == 1
    with pytest.raises(TopologyError, match="Ray tier 'expertd'"):
        RayTier().resolve()
    wait_for(lambda: ray.available_resources().get("CPU") == 4, "every CPU to be free again")


def test_a_tier_with_tls_on_fractions_of_a_gpu(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only one node has a GPU, in its books: both servers go there, share it, and see no other."""
    certificates = ["--tls-cert-file", str(CERTS / "server.pem"), "--tls-key-file", str(CERTS / "server.key")]
    topology = tmp_path / "experts.json"
    node = patiently(lambda: cluster.add_node(num_gpus=1, **NODE))
    try:
        options = ["--synthetic", "tiny", "--device", "cpu", "--topology-file", str(topology), *certificates]
        assert main(["cluster", "up", "--shards", "3", "--gpus-per-shard", "0.5", *options]) == 1
        assert "no room for 1 replicas of shard 2: each needs 1 CPU and 0.5 GPU" in capsys.readouterr().err
        cli("up", "--shards", "2", "--gpus-per-shard", "0.5", *options)
        tier = report(capsys)
        assert {each["state"] for each in tier["replicas"]} == {"serving"}
        assert all(each["node"].endswith(node.node_id[:8]) for each in tier["replicas"])
        for each in tier["replicas"]:
            assert psutil.Process(each["pid"]).environ()["CUDA_VISIBLE_DEVICES"] == "0"
        trusted = functools.partial(ClientConfig, ca_file=CERTS / "authority.pem", server_name="localhost")
        with ExpertGroup(topology, GroupConfig(client=trusted)) as group, Callers(group) as callers:
            callers.check()
        cli("down")
    finally:
        cluster.remove_node(node)


@pytest.fixture
def room_for_four(cluster: Any) -> Iterator[None]:
    """Ray has free CPUs for four servers of one CPU each, whichever nodes other tests have left."""
    all_cpus = sum(node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"])
    wait_for(lambda: ray.available_resources().get("CPU") == all_cpus, "every CPU to be free")
    spare = int(all_cpus) - 4
    assert spare >= 0
    if not spare:
        yield
        return
    filler = ray.util.placement_group([{"CPU": 1}] * spare, strategy="PACK")
    assert filler.wait(PATIENCE_S)
    try:
        yield
    finally:
        ray.util.remove_placement_group(filler)


@pytest.mark.usefixtures("room_for_four")
def test_a_hot_expert_gets_a_replica_of_an_idle_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody asks for it: the controller sees what the servers say of their work."""
    topology = tmp_path / "experts.json"
    # A few requests fill the queue, so that the load is high whatever else the machine does.
    queue = ["--max-batch-tokens", str(HOT_TOKENS), "--max-queue-tokens", str(4 * HOT_TOKENS)]
    options = ["--synthetic", "tiny", "--device", "cpu", "--topology-file", str(topology), *queue]
    cli("up", "--shards", "2", "--replicas", "2", *options)
    before = report(capsys)
    assert before["notes"] == []
    with ExpertGroup(topology, GroupConfig(refresh_interval_s=0.3)) as group, HotCallers(group) as callers:
        callers.check()
        wait_for(lambda: report(capsys)["notes"] or callers.failures, "a move")
        callers.pause_s = Callers.pause_s
        old = {each["pid"] for each in before["replicas"]}
        wait_for(lambda: all_serve(capsys, 4, shards=[0, 0, 0, 1]), "the replica that was moved")
        after = report(capsys)
        wait_for(lambda: addresses(topology) == {each["address"] for each in after["replicas"]}, "the topology file")
        callers.check()
    assert not callers.failures
    assert len(callers.outputs) == 1
    (note,) = after["notes"]
    assert note.startswith("moving a replica of shard 1 to shard 0: shard 0 carries a load of ")
    assert f"expert {HOT_EXPERT} gets 50% of it" in note
    assert [each["shard"] for each in after["replicas"]] == [0, 0, 0, 1]
    assert len(old & {each["pid"] for each in after["replicas"]}) == 3
    cli("down")


def all_serve(
    capsys: pytest.CaptureFixture[str], count: int, without: list[int] | None = None, shards: list[int] | None = None
) -> bool:
    replicas = report(capsys)["replicas"]
    return (
        len(replicas) == count
        and all(each["state"] == "serving" for each in replicas)
        and not {each["pid"] for each in replicas} & set(without or [])
        and shards in (None, [each["shard"] for each in replicas])
    )


def process_of_controller() -> psutil.Process:
    controller = ray.get_actor(controller_name("expertd"), NAMESPACE)
    pid: int = ray.get(controller.__ray_call__.remote(lambda _: os.getpid()), timeout=PATIENCE_S)
    return psutil.Process(pid)


def published(capsys: pytest.CaptureFixture[str]) -> set[str]:
    return {each["address"] for each in report(capsys)["replicas"]}


def addresses(topology: Path) -> set[str]:
    return {server["address"] for server in json.loads(topology.read_text())["servers"]}
