"""`expertd-server cluster up | status | scale | move | down`: a tier of servers on the nodes of a Ray cluster."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray warns of deprecations in its own imports
    import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.table import Table

from expertd_server.cluster_actors import Controller
from expertd_server.cluster_places import ClusterError
from expertd_server.cluster_replica import ReplicaReport, TierReport
from expertd_server.cluster_spec import NAMESPACE, SET_BY_THE_CLUSTER, ClusterSpec, controller_name
from expertd_server.config import Config, command_line, config_from
from expertd_server.errors import ConfigError

__all__ = ["down", "move", "scale", "status", "up"]

_ASK_TIMEOUT_S = 30.0
_DOWN_MARGIN_S = 60.0
_UNUSABLE = 2  # the exit code of a server whose options or checkpoint cannot be used


def up(options: argparse.Namespace) -> int:
    """Place every server, wait until all answer, print where they are. Takes everything down again when it fails."""
    spec = _spec(options)
    with _connected(options.address):
        with contextlib.suppress(ValueError):
            ray.get_actor(controller_name(spec.name), NAMESPACE)
            raise ClusterError(f"tier {spec.name!r} is up already: take it down first, or use another --name")
        controller: Any = (
            ray.remote(Controller)
            .options(
                name=controller_name(spec.name),
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                max_concurrency=16,
                num_cpus=0,
                # Here, where the topology file is wanted, for as long as this host lives.
                scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
            )
            .remote(spec)
        )
        until_s = time.monotonic() + options.timeout_s
        try:
            _change(controller.start, until_s=until_s)
            report = _wait_ready(spec.name, until_s)
        except BaseException as error:
            try:
                _take_down(controller, spec)
            except ClusterError as left:
                raise ClusterError(f"{str(error) or type(error).__name__}; {left}") from error
            raise
        _print(report)
        print(_usage(spec))
    return 0


def status(options: argparse.Namespace) -> int:
    """Print every server; exit code 0 when all serve, else 1."""
    # Ray prints what it hears of dead nodes to stdout, where with --json nothing but JSON belongs.
    with contextlib.redirect_stdout(sys.stderr), _connected(options.address):
        report = _report(options.name)
    if options.json:
        print(json.dumps(_as_json(report)))
    else:
        _print(report)
    return 0 if all(map(_serves, report.replicas)) else 1


def scale(options: argparse.Namespace) -> int:
    """Change the number of replicas of one shard or of each."""
    if options.replicas < 1:
        raise ConfigError(f"replicas is {options.replicas}, expected at least 1; to stop everything: cluster down")
    with _connected(options.address):
        _check_shards(options.name, shard=options.shard)
        until_s = time.monotonic() + options.timeout_s
        _change(_controller(options.name).scale, options.replicas, options.shard, until_s=until_s)
        _print(_wait_ready(options.name, until_s))
    return 0


def move(options: argparse.Namespace) -> int:
    """Take a replica from one shard and give it to another."""
    if options.source == options.target:
        raise ConfigError(f"source and target are both {options.source}, expected two shards")
    with _connected(options.address):
        _check_shards(options.name, source=options.source, target=options.target)
        until_s = time.monotonic() + options.timeout_s
        _change(_controller(options.name).move, options.source, options.target, until_s=until_s)
        _print(_wait_ready(options.name, until_s))
    return 0


def down(options: argparse.Namespace) -> int:
    """Let every server finish what it has, stop all of them, free what was reserved."""
    with _connected(options.address):
        spec = _report(options.name).spec
        _take_down(_controller(options.name), spec)
    return 0


def _spec(options: argparse.Namespace) -> ClusterSpec:
    flags = vars(options)
    for name in SET_BY_THE_CLUSTER:
        if name in flags:
            raise ConfigError(f"--{name.replace('_', '-')} is set, but the cluster chooses it for each server")
    config = config_from(flags)
    defaults: dict[str, Any] = {name: getattr(Config, name) for name in SET_BY_THE_CLUSTER}
    # The servers run elsewhere: a path has to mean the same on every node.
    paths: dict[str, Any] = {name: p.absolute() for name, p in vars(config).items() if isinstance(p, Path)}
    config = dataclasses.replace(config, **(paths | defaults))
    return ClusterSpec(
        name=options.name,
        num_experts=_num_experts(config),
        shards=options.shards,
        replicas=options.replicas,
        min_replicas=options.min_replicas,
        max_replicas=2 * options.replicas if options.max_replicas is None else options.max_replicas,
        cpus_per_shard=options.cpus_per_shard,
        gpus_per_shard=options.gpus_per_shard,
        topology_file=options.topology_file and options.topology_file.absolute(),
        prometheus_file=options.prometheus_file and options.prometheus_file.absolute(),
        rebalance=options.rebalance,
        serve_flags=tuple(command_line(config)),
        start_timeout_s=options.start_timeout_s,
        max_queue_tokens=config.max_queue_tokens,
        shutdown_grace_s=config.shutdown_grace_s,
    )


def _usage(spec: ClusterSpec) -> str:
    """How a worker uses the tier."""
    config = ""
    if spec.is_tls:
        # One certificate for all servers, whose addresses nobody knew when it was made: its name is to be said.
        options = 'ca_file="...", server_name="..."'
        if "--tls-client-ca-file" in spec.serve_flags:
            options += ', cert_file="...", key_file="..."'
        config = f", expertd.GroupConfig(client=functools.partial(expertd.ClientConfig, {options}))"
    if spec.topology_file is None:
        return f'workers in the Ray cluster: expertd.ExpertGroup(expertd.ray.RayTier("{spec.name}"){config})'
    return f'workers: expertd.ExpertGroup("{spec.topology_file}"{config})'


def _num_experts(config: Config) -> int:
    # Imported for `up` alone: they bring torch, for which `status` and the others need not wait two seconds.
    from expertd_server.checkpoint import open_checkpoint  # noqa: PLC0415
    from expertd_server.synthetic import synthetic_spec  # noqa: PLC0415

    if config.checkpoint is not None:
        return open_checkpoint(config.checkpoint).architecture.spec.num_experts
    if config.synthetic is None:
        raise ConfigError("nothing to serve: give --checkpoint or --synthetic")
    return synthetic_spec(config.synthetic).num_experts


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """A connection to the Ray cluster at `address`; None: RAY_ADDRESS, or the one on this machine."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address or "auto", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RayError, ValueError) as error:
        raise ClusterError(f"no Ray cluster at {address or 'RAY_ADDRESS or on this machine'}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _controller(tier: str) -> Any:
    try:
        return ray.get_actor(controller_name(tier), NAMESPACE)
    except ValueError:
        raise ClusterError(f"no tier {tier!r} on this Ray cluster") from None


def _check_shards(tier: str, **numbers: int | None) -> None:
    shards = _report(tier).spec.shards
    for name, number in numbers.items():
        if number is not None and not 0 <= number < shards:
            raise ConfigError(f"{name} is {number}, expected 0 to {shards - 1}")


def _report(tier: str) -> TierReport:
    """What the controller says. One that is just being started again is waited for: to ask twice changes nothing."""
    until_s = time.monotonic() + _ASK_TIMEOUT_S
    while True:
        try:
            report: TierReport = ray.get(_controller(tier).report.remote(), timeout=_ASK_TIMEOUT_S)
            return report
        except RayActorError as error:
            if time.monotonic() > until_s:
                raise ClusterError(f"the controller does not come back: {_first_line(error)}") from error
            time.sleep(0.2)
        except RayError as error:
            raise ClusterError(f"the controller does not answer: {_first_line(error)}") from error


def _change(method: Any, *arguments: object, until_s: float) -> None:
    """Have the controller do something, once: what it had done of it when it died, only a report can tell."""
    try:
        ray.get(method.remote(*arguments), timeout=max(0.0, until_s - time.monotonic()))
    except GetTimeoutError as error:
        raise ClusterError(
            "the controller has not done it within --timeout-s, and may still: see cluster status, then ask again, "
            "with a longer --timeout-s"
        ) from error
    except RayActorError as error:
        raise ClusterError(
            f"the controller died at it: {_first_line(error)}; see cluster status, then ask again"
        ) from error


def _first_line(error: RayError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _wait_ready(tier: str, until_s: float) -> TierReport:
    while True:
        report = _report(tier)
        for replica in report.replicas:
            if replica.status.exit_code == _UNUSABLE:
                raise ClusterError(f"{replica.name} on {replica.node}: {replica.status.last_words}")
        waiting = [replica.name for replica in report.replicas if not _serves(replica)]
        if report.replicas and not waiting:
            return report
        if time.monotonic() > until_s:
            _print(report)
            raise ClusterError(f"{', '.join(waiting)} did not serve within --timeout-s: see their logs (ray logs)")
        time.sleep(0.2)


def _take_down(controller: Any, spec: ClusterSpec) -> None:
    """End every server, then the controller. Raises ClusterError, and leaves the controller, when servers remain."""
    try:
        ray.get(controller.down.remote(), timeout=spec.shutdown_grace_s + _DOWN_MARGIN_S)
    except RayError as error:  # without their controller nobody would find the servers again
        raise ClusterError(
            f"tier {spec.name!r} is not down yet: {_first_line(error)}; run cluster down again"
        ) from error
    ray.kill(controller, no_restart=True)


def _serves(replica: ReplicaReport) -> bool:
    return replica.is_reachable and replica.status.state == "serving"


def _as_json(report: TierReport) -> dict[str, Any]:
    replicas = [
        {
            "name": each.name,
            "shard": each.shard,
            "experts": each.experts,
            "node": each.node,
            "address": each.status.address,
            "admin_port": each.status.admin_port,
            "pid": each.status.pid,
            "state": _state(each),
            "queue_tokens": each.status.stats.queue_tokens,
            "tokens_per_s": each.tokens_per_s,
            "busy": each.busy,
            "num_starts": each.status.num_starts,
            "last_words": each.status.last_words,
        }
        for each in report.replicas
    ]
    topology = report.spec.topology_file
    return {
        "name": report.spec.name,
        "topology_file": None if topology is None else str(topology),
        "replicas": replicas,
        "notes": list(report.notes),
    }


def _state(replica: ReplicaReport) -> str:
    return replica.status.state if replica.is_reachable else "unreachable"


def _print(report: TierReport) -> None:
    table = Table("shard", "experts", "replica", "node", "address", "health", title=f"tier {report.spec.name}")
    takes_orders = any(each.status.admin_port is not None for each in report.replicas)
    for title in ("queue tokens", "tokens/s", "busy", *(["admin port"] if takes_orders else [])):
        table.add_column(title, justify="right")
    for each in report.replicas:
        table.add_row(
            str(each.shard),
            each.experts,
            each.name,
            each.node,
            each.status.address or "-",
            _state(each),
            f"{each.status.stats.queue_tokens:.0f}",
            f"{each.tokens_per_s:.0f}",
            f"{each.busy:.0%}",
            *([str(each.status.admin_port or "-")] if takes_orders else []),
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for note in report.notes:
        console.print(note, highlight=False, markup=False)
