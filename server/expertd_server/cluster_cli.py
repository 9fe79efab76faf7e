"""The flags of `expertd-server cluster`. Ray itself is imported when a command runs."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expertd_server.config import add_flags
from expertd_server.errors import ConfigError

__all__ = ["add_cluster_command"]

_UP_EXAMPLES = """\
examples:
  Four shards of two replicas each, one GPU for each server, on hosts of their own where there are enough:
    expertd-server cluster up --shards 4 --replicas 2 --gpus-per-shard 1 \\
      --checkpoint /shared/Qwen3-30B-A3B-FP8 --topology-file /shared/experts.json
  Try it on one machine, without GPUs:
    ray start --head
    expertd-server cluster up --shards 2 --replicas 2 --synthetic tiny --device cpu --topology-file experts.json

Every option of `serve` is taken too, its environment variables included, and given to every server; only those that
differ from server to server are not: --experts, --host, --port, --metrics-port, --ready-file, --expert-token-metrics.
"""


def add_cluster_command(commands: Any) -> None:
    """Declare `cluster` and what is below it. commands: what `add_subparsers` returned."""
    cluster = commands.add_parser(
        "cluster",
        help="run a tier of servers on the nodes of a Ray cluster",
        description="Place servers on the nodes of a Ray cluster, keep them running, and tell workers where they are.",
    )
    actions = cluster.add_subparsers(required=True, metavar="ACTION")
    up = _add(
        actions,
        "up",
        "start a tier, and wait until every server answers",
        epilog=_UP_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    up.add_argument("--shards", type=int, required=True, metavar="N", help="slices of the experts")
    up.add_argument("--replicas", type=int, default=1, metavar="N", help="servers of each slice; default: 1")
    up.add_argument(
        "--min-replicas",
        type=int,
        default=1,
        metavar="N",
        help="fewest that rebalancing leaves a shard; default: 1, so that --replicas 2 can help a busy shard; but when "
        "that one fails, its experts are missing until it is started again",
    )
    up.add_argument(
        "--max-replicas",
        type=int,
        metavar="N",
        help="most that rebalancing gives a shard where the Ray cluster has room; default: twice --replicas",
    )
    up.add_argument("--cpus-per-shard", type=float, default=1, metavar="N", help="for each server; default: 1")
    up.add_argument("--gpus-per-shard", type=float, default=0, metavar="N", help="for each server; default: 0")
    up.add_argument(
        "--topology-file", type=_json_file, metavar="FILE.json", help="keep the servers' addresses in this file"
    )
    up.add_argument(
        "--prometheus-file",
        type=_json_file,
        metavar="FILE.json",
        help="and where their metrics are, for file_sd_configs",
    )
    up.add_argument(
        "--rebalance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="give a busy shard one more replica, in a free place or an idle one's (docs/operations.md); default: on",
    )
    up.add_argument(
        "--start-timeout-s",
        type=float,
        default=3600,
        metavar="SECONDS",
        help="a server that is not ready so long after its start is killed and started again; default: 3600",
    )
    _add_timeout(up)
    add_flags(up)
    status = _add(actions, "status", "show every server: exit code 0 when all serve, else 1")
    status.add_argument("--json", action="store_true", help="for programs")
    scale = _add(actions, "scale", "change the number of replicas, while requests run")
    scale.add_argument("--replicas", type=int, required=True, metavar="N", help="of each shard, or of --shard")
    scale.add_argument("--shard", type=int, metavar="N", help="which one; default: each")
    _add_timeout(scale)
    move = _add(actions, "move", "take a replica from one shard and give it to another")
    move.add_argument("--source", type=int, required=True, metavar="SHARD", help="which has one to give")
    move.add_argument("--target", type=int, required=True, metavar="SHARD", help="which gets it")
    _add_timeout(move)
    _add(actions, "down", "let every server finish what it has, and stop all")


def _add(actions: Any, name: str, text: str, **arguments: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, **arguments)
    parser.add_argument("--name", default="expertd", metavar="NAME", help="of the tier; default: expertd")
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="of the Ray cluster; default: RAY_ADDRESS, or the one on this machine"
    )
    parser.set_defaults(run=_runner(name))
    return parser


def _add_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout-s", type=float, default=600, metavar="SECONDS", help="until every server answers; default: 600"
    )


def _runner(name: str) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("`cluster` needs Ray: pip install 'expertd-server[ray]'")
        module = importlib.import_module("expertd_server.cluster")
        code: int = getattr(module, name)(options)
        return code

    return run


def _json_file(text: str) -> Path:
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a name that ends in .json")
    return Path(text)
