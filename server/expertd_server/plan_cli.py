"""The flags of `expertd-server plan`."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_plan_command"]


def add_plan_command(commands: Any) -> None:
    """Declare `plan`. commands: what `add_subparsers` returned."""
    plan = commands.add_parser(
        "plan",
        help="predict speed, memory and network of a tier",
        description="Predict latency, tokens per second, memory and network load of a tier of servers from measured "
        "kernel and transport times, and say whether the network makes it a bad idea.",
    )
    plan.add_argument("--model", required=True, metavar="MODEL", help="a preset, such as deepseek-v3, or a checkpoint")
    plan.add_argument("--network-gbps", type=float, required=True, metavar="GBPS", help="gigabits/s of one host's link")
    plan.add_argument("--gpu", default="h100", metavar="GPU", help="h100 or h200; default: h100")
    plan.add_argument(
        "--tokens", type=int, default=256, metavar="N", help="in one step of all workers together; default: 256"
    )
    plan.add_argument("--layers", type=int, metavar="N", help="MoE layers; default: those of the model")
    plan.add_argument("--shards", type=int, metavar="N", help="default: the fewest that fit into memory")
    plan.add_argument("--replicas", type=int, default=1, metavar="N", help="of each shard; default: 1")
    plan.add_argument("--workers", type=int, default=1, metavar="N", help="attention hosts; default: 1")
    plan.add_argument(
        "--frontends",
        type=int,
        default=1,
        metavar="N",
        help="serving processes of each server; 1 and 4 were measured, others count as the next fewer; default: 1",
    )
    plan.add_argument("--wire", choices=("fp8", "bf16"), default="fp8", help="type of hidden states sent; default: fp8")
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from expertd_server.plan_report import print_plan  # noqa: PLC0415 (torch: --help should not wait for it)

    return print_plan(options)
