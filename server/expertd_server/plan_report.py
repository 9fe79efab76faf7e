"""`expertd-server plan`: what a tier would do, before anything is bought or started."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from expertd_server.checkpoint import open_checkpoint
from expertd_server.errors import ConfigError
from expertd_server.plan import Plan, Question, make_plan
from expertd_server.plan_figures import Figures, load_figures
from expertd_server.synthetic import PRESETS
from expertd_server.types import LayerSpec

__all__ = ["MODEL_LAYERS", "print_plan"]

MODEL_LAYERS = {"deepseek-v3": 58, "llama4-scout": 48, "mixtral-8x7b": 32, "qwen3-30b-a3b": 48, "tiny": 1}
"""MoE layers of the models that presets are named after; for others --layers has to say it."""

_HEADLINES = {
    "good": "[green]Disaggregation holds up: the GPUs are the bound.[/green]",
    "limited": "[yellow]It works, but something else than the GPUs is the bound.[/yellow]",
    "bad": "[red]Do not disaggregate like this.[/red]",
}


def print_plan(options: argparse.Namespace) -> int:
    """Print a plan as tables, or as JSON."""
    spec, num_layers = _model(options.model)
    layers = num_layers if options.layers is None else options.layers
    if layers is None:
        raise ConfigError(f"--layers is missing: how many MoE layers {options.model} has is not known here")
    question = Question(
        spec=spec,
        num_layers=layers,
        gpu=options.gpu,
        network_gbps=options.network_gbps,
        tokens=options.tokens,
        shards=options.shards,
        replicas=options.replicas,
        workers=options.workers,
        frontends=options.frontends,
        wire=options.wire,
    )
    figures = load_figures()
    plan = make_plan(question, figures)
    if options.json:
        print(json.dumps(as_json(plan, figures)))
    else:
        _print_tables(plan, figures, options.model)
    return 0


def _model(name: str) -> tuple[LayerSpec, int | None]:
    """Shape of a layer, and how many there are, where it is known."""
    if name in PRESETS:
        return PRESETS[name], MODEL_LAYERS.get(name)
    if not Path(name).exists():
        raise ConfigError(f"model is {name!r}, expected a checkpoint or one of {', '.join(PRESETS)}")
    checkpoint = open_checkpoint(name)
    return checkpoint.architecture.spec, len(checkpoint.layer_names)


def as_json(plan: Plan, figures: Figures) -> dict[str, Any]:
    """Everything in the tables, in the same units."""
    return {
        "shards": plan.shards,
        "min_shards": plan.min_shards,
        "replicas": plan.question.replicas,
        "memory_bytes_per_server": plan.memory_bytes,
        "shards_per_token": plan.shards_per_token,
        "sent_bytes_per_token_and_layer": plan.sent_bytes,
        "received_bytes_per_token_and_layer": plan.received_bytes,
        "layer_us": {
            "client": plan.client_us,
            "exchange": plan.exchange_us,
            "wire": plan.wire_us,
            "copies": plan.copies_us,
            "kernels": plan.kernel_us,
            "total": plan.layer_us,
            "local": plan.local_us,
        },
        "step_ms": plan.step_ms,
        "tokens_per_s": {
            "one_step_in_flight": plan.lockstep_tokens_per_s,
            "bounds": {bound.name: bound.tokens_per_s for bound in plan.bounds},
            "local": plan.local_tokens_per_s,
        },
        "bound": plan.bound.name,
        "gbps_for_the_gpus": plan.gbps_for_the_gpus,
        "verdict": plan.verdict,
        "reasons": plan.reasons(),
        "sources": _sources(plan, figures),
    }


def _sources(plan: Plan, figures: Figures) -> list[str]:
    gpu = plan.gpu
    error = f"fit of {gpu.cells} cells, error {gpu.rms_error:.1%} rms, {gpu.worst_error:.1%} at worst."
    scaled = " The kernels were not timed on this GPU." if gpu.is_scaled else ""
    return [
        f"kernels: {gpu.source}; {error}{scaled}",
        f"client: {figures.client.source}; error {figures.client.worst_error:.0%} at worst.",
        f"transport: {figures.transport.source}.",
        "network: its nominal rate, both ways at once; protocols take some per cent of it. Even routing.",
    ]


def _print_tables(plan: Plan, figures: Figures, model: str) -> None:
    question, console = plan.question, Console(highlight=False)
    tier = Table("tier", "", title=f"{model}, {question.num_layers} MoE layers, {question.tokens:,} tokens a step")
    for name, value in {
        "servers": f"{plan.shards} shards, {question.replicas} replicas of each, {plan.gpu.gpu}",
        "memory per server": f"{plan.memory_bytes / 1e9:.1f} of {plan.gpu.memory_bytes / 1e9:.0f} GB "
        f"(fewest shards that fit: {plan.min_shards})",
        "servers per token": f"{plan.shards_per_token:.2f} of {plan.shards}",
        "bytes per token and layer": f"{plan.sent_bytes:,.0f} out ({question.wire}), {plan.received_bytes:,.0f} back",
        "batch of a server": f"{plan.server_tokens:,.1f} tokens",
    }.items():
        tier.add_row(name, value)
    latency = Table("one layer, one step in flight", title="latency")
    latency.add_column("µs", justify="right")
    parts = {
        "client: route, split, sum": plan.client_us,
        "gRPC on both hosts": plan.exchange_us,
        "network": plan.wire_us,
        "copies to and from the GPU": plan.copies_us,
        "kernels": plan.kernel_us,
        "together": plan.layer_us,
    }
    for name, part_us in parts.items():
        latency.add_row(name, f"{part_us:,.0f}", end_section=name == "kernels")
    latency.add_row(f"all {question.num_layers} layers, ms", f"{plan.step_ms:,.1f}")
    rates = Table("bound, enough steps in flight", title="whole model, tokens/s")
    rates.add_column("tokens/s", justify="right")
    for bound in sorted(plan.bounds, key=lambda bound: bound.tokens_per_s):
        rates.add_row(bound.name, f"{bound.tokens_per_s:,.0f}")
    rates.add_section()
    rates.add_row("one step in flight", f"{plan.lockstep_tokens_per_s:,.0f}")
    if plan.local_tokens_per_s is not None:
        rates.add_row("one GPU with all experts, no network", f"{plan.local_tokens_per_s:,.0f}")
    for table in (tier, latency, rates):
        console.print(table)
    console.print(_HEADLINES[plan.verdict])
    for line in plan.reasons():
        console.print(f"  {line}")
    for line in _sources(plan, figures):
        console.print(f"  [dim]{line}[/dim]")
