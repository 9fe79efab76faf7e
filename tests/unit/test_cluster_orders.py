"""Orders to a tier that fail half way lose nothing. No Ray cluster: its calls are played."""

from __future__ import annotations

import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs Ray: pip install 'expertd-server[ray]'")

from ray.exceptions import GetTimeoutError

from expertd_server import cluster
from expertd_server.cluster_actors import Controller
from expertd_server.cluster_places import ClusterError
from expertd_server.cluster_policy import Balancer, PolicyConfig
from expertd_server.cluster_replica import Replica, ReplicaReport, TierReport
from expertd_server.cluster_server import ServerStats, ServerStatus


class FullCluster(Controller):
    """A controller whose Ray cluster has room for `room` replicas of its one shard."""

    def __init__(self, present: int, goal: int, room: int) -> None:
        self._spec: Any = SimpleNamespace(shards=1)
        self._changing = threading.Lock()
        self._goal = Counter({0: goal})
        self.present, self.room = present, room

    def _of(self, shard: int) -> list[Any]:
        return [None] * self.present

    def _add_replica(self, shard: int) -> None:
        if self.present == self.room:
            raise ClusterError("no room")
        self.present += 1

    def _retire(self, replicas: Any, *, keep_place: bool = False) -> None:
        self.present -= len(replicas)


@pytest.mark.parametrize(
    ("present", "goal", "room", "expected"),
    [(2, 3, 2, 3), (2, 2, 3, 3), (2, 2, 2, 2)],
    ids=["one was lost", "one found room", "none found room"],
)
def test_a_scaling_that_fails_never_lowers_the_goal(present: int, goal: int, room: int, expected: int) -> None:
    controller = FullCluster(present, goal, room)
    with pytest.raises(ClusterError, match="no room"):
        controller.scale(4)
    assert controller._goal[0] == expected


@pytest.mark.parametrize("replicas", [1, 3])
def test_a_scaling_that_works_sets_the_goal(replicas: int) -> None:
    controller = FullCluster(present=2, goal=2, room=4)
    controller.scale(replicas)
    assert (controller.present, controller._goal[0]) == (replicas, replicas)


class Tended(Controller):
    """A controller of two shards with three replicas each, whose servers say what the test lets them say."""

    def __init__(self, room: int = 0) -> None:
        """room: replicas that Ray's cluster can take beside those that are there."""
        self._spec: Any = SimpleNamespace(shards=2, rebalance=True)
        self._goal = Counter({0: 3, 1: 3})
        self._notes: list[str] = []
        self.room = room
        self.added: list[int] = []
        self._lock = threading.RLock()
        self._balancer = Balancer(PolicyConfig(patience=3))
        self._replicas = {
            name: Replica(name, None, shard, (f"t.g{shard}", index))
            for shard in range(2)
            for index in range(3)
            for name in [f"t.s{shard}.g{shard}.{index}"]
        }
        self.moves: list[tuple[int, int, str]] = []

    def _move(self, source: int, target: int, reason: str) -> None:
        self.moves.append((source, target, reason))

    def _add_replica(self, shard: int) -> None:
        if len(self.added) == self.room:
            raise ClusterError("no room")
        self.added.append(shard)

    def look(self, second: int, busy: tuple[float, float]) -> None:
        """Every server has been this busy, shard by shard, for so many seconds; expert 6 is the hot one of shard 1."""
        for replica in self._replicas.values():
            tokens = {6: 900 * second, 7: 100 * second} if replica.shard else {0: second}
            stats = ServerStats(busy_s=busy[replica.shard] * second, expert_tokens=tokens)
            status = ServerStatus(state="serving", address="h:1", instance_id="one", at_s=float(second), stats=stats)
            replica.take(("node", "10.0.0.1", status))
        self._rebalance()


def test_what_servers_report_of_late_moves_a_replica_to_the_shard_of_the_hot_expert() -> None:
    controller = Tended()
    for second in range(1, 20):
        controller.look(second, busy=(0.1, 0.9))
    ((source, target, reason),) = controller.moves
    assert (source, target) == (0, 1)
    assert "expert 6 gets 90% of it" in reason
    assert controller._goal == {0: 3, 1: 3}, "what found no room is no goal"


def test_where_there_is_room_nobody_has_to_give() -> None:
    controller = Tended(room=1)
    for second in range(1, 20):
        controller.look(second, busy=(0.1, 0.9))
    assert (controller.added, controller.moves) == ([1], [])
    assert controller._goal == {0: 3, 1: 4}
    (note,) = controller._notes
    assert note.startswith("one more replica of shard 1, in a free place: shard 1 carries a load of ")


def test_even_loads_move_nothing() -> None:
    controller = Tended()
    for second in range(1, 20):
        controller.look(second, busy=(0.9, 0.9))
    assert controller.moves == []


def test_the_controller_outlives_a_down_that_did_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[object] = []
    answers: list[Exception | None] = [GetTimeoutError("timed out"), None]

    def get(_reference: object, timeout: float) -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    monkeypatch.setattr(cluster.ray, "get", get)
    monkeypatch.setattr(cluster.ray, "kill", lambda actor, no_restart: killed.append(actor))
    controller = SimpleNamespace(down=SimpleNamespace(remote=lambda: None))
    spec: Any = SimpleNamespace(name="tier", shutdown_grace_s=1.0)
    with pytest.raises(ClusterError, match=r"'tier' is not down yet: timed out; run cluster down again"):
        cluster._take_down(controller, spec)
    assert killed == []
    cluster._take_down(controller, spec)
    assert killed == [controller]


def test_an_order_that_is_not_done_in_time_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that hangs holds up no command for ever."""
    timeouts: list[float] = []

    def get(_reference: object, timeout: float) -> None:
        timeouts.append(timeout)
        raise GetTimeoutError("timed out")

    monkeypatch.setattr(cluster.ray, "get", get)
    scale = SimpleNamespace(remote=lambda *_arguments: None)
    for until_s in (time.monotonic() + 600, time.monotonic() - 1):
        with pytest.raises(ClusterError, match="not done it within --timeout-s, and may still: see cluster status"):
            cluster._change(scale, 3, None, until_s=until_s)
    assert 0 < timeouts[0] <= 600
    assert timeouts[1] == 0


def test_status_shows_the_port_for_orders(capsys: pytest.CaptureFixture[str]) -> None:
    status = ServerStatus(state="serving", address="10.0.0.1:5", admin_port=41234)
    replica = ReplicaReport(
        name="t.s0.g0.0",
        shard=0,
        experts="0-7",
        node="n",
        status=status,
        is_reachable=True,
        tokens_per_s=0.0,
        busy=0.0,
    )
    spec: Any = SimpleNamespace(name="t", topology_file=None)
    report = TierReport(spec, (replica,), ())
    cluster._print(report)
    assert "41234" in capsys.readouterr().out
    assert cluster._as_json(report)["replicas"][0]["admin_port"] == 41234
