"""What a checkpoint holds, for people: `expertd-server inspect PATH`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from expertd_server.accounting import LayerAccount, scale_problem
from expertd_server.checkpoint import Checkpoint, open_checkpoint
from expertd_server.dialects import Kind, Projection

__all__ = ["print_audit"]

MAX_LINES = 20


def print_audit(path: str | Path, console: Console | None = None) -> bool:
    """Print the layers, the scales and everything unusual of a checkpoint; reads headers and scales, no weights.

    Returns whether every layer can be loaded (given a calibration file, where the output says that one is needed).
    Raises CheckpointError where the checkpoint as a whole cannot be read.
    """
    console = console or Console()
    checkpoint = open_checkpoint(path)
    accounts = [_account(checkpoint, name) for name in checkpoint.layer_names]
    _print_summary(checkpoint, console)
    layer = Column("layer", no_wrap=True)  # however narrow the rest: names that are cut off look alike
    table = Table(layer, "experts", "weights", "weight scales", "input scales", "bad scales", "gate and up differ")
    problems: list[str] = []
    for account in accounts:
        values = _scale_values(checkpoint, account)
        problems += account.problems
        problems += [f"{name} is {value}" for name, value in values.items() if not _is_good(value)]
        table.add_row(*_layer_row(account, values))
    console.print(table)
    _print_notes(checkpoint, accounts, console)
    if problems:
        console.print(f"[red]{len(problems)} problems[/red]; the layers that they are in cannot be loaded:")
        _print_lines(console, problems)
    else:
        console.print(f"[green]{len(accounts)} layers can be loaded[/green]")
    return not problems


def _account(checkpoint: Checkpoint, layer_name: str) -> LayerAccount:
    """The account of a layer; input scales that are wholly absent are no problem here, but a note."""
    account = checkpoint.account(layer_name)
    return account if account.has_input_scales else checkpoint.account(layer_name, need_input_scales=False)


def _print_summary(checkpoint: Checkpoint, console: Console) -> None:
    architecture = checkpoint.architecture
    spec = architecture.spec
    spelt = {projection: name for name, projection in architecture.dialect.projections.items()}
    rows = {
        "checkpoint": f"{checkpoint.path}, {len(checkpoint.files.file_names)} files",
        "family": f"{architecture.family}, {len(checkpoint.layer_names)} MoE layers",
        "layer": f"hidden_size {spec.hidden_size}, intermediate_size {spec.intermediate_size}, "
        f"{spec.num_experts} experts, top_k {spec.top_k}",
        "routing": f"{spec.routing_method.name}, norm_topk_prob {spec.norm_topk_prob}"
        + (f", {spec.topk_group} of {spec.n_group} groups" if spec.is_grouped else ""),
        "activation": spec.activation.name,
        "quantisation": checkpoint.quantization,
        # Nothing in a file can tell gate from up, so say which name is taken for which.
        "names": ", ".join(f"{projection} is {spelt[projection]}" for projection in Projection if projection in spelt),
    }
    for name, value in rows.items():
        console.print(f"[bold]{name:>12}[/bold]  {escape(value)}", highlight=False, soft_wrap=True)


def _scale_values(checkpoint: Checkpoint, account: LayerAccount) -> dict[str, float]:
    """Every scale of a layer by tensor name; those of a wrong shape or type are among the account's problems."""
    values: dict[str, float] = {}
    for (_, _, kind), name in account.tensors.items():
        if kind is not Kind.WEIGHT and scale_problem(checkpoint.files, name) is None:
            values[name] = checkpoint.scale_value(name)
    return values


def _layer_row(account: LayerAccount, values: dict[str, float]) -> list[str]:
    bad = Counter(_badness(value) for value in values.values() if not _is_good(value))
    weights = sum(1 for _, _, kind in account.tensors if kind is Kind.WEIGHT)
    return [
        account.layer_name,
        str(len({expert for expert, _, _ in account.tensors})),
        f"{account.num_fp8_weights} FP8, {weights - account.num_fp8_weights} wider",
        _span(values[n] for (_, _, kind), n in account.tensors.items() if kind is Kind.WEIGHT_SCALE and n in values),
        _span(values[n] for (_, _, kind), n in account.tensors.items() if kind is Kind.INPUT_SCALE and n in values),
        ", ".join(f"{count} {what}" for what, count in sorted(bad.items())) or "none",
        f"{_unequal(account, values, Kind.WEIGHT_SCALE)} weight, {_unequal(account, values, Kind.INPUT_SCALE)} input",
    ]


def _span(values: Iterable[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"{min(finite):.3g} to {max(finite):.3g}" if finite else "none"


def _unequal(account: LayerAccount, values: dict[str, float], kind: Kind) -> int:
    """Experts whose gate and up scales differ."""
    experts = {expert for expert, _, _ in account.tensors}
    pairs = [[account.tensors.get((e, p, kind), "") for p in (Projection.GATE, Projection.UP)] for e in experts]
    return sum(1 for gate, up in pairs if gate in values and up in values and values[gate] != values[up])


def _is_good(scale: float) -> bool:
    return math.isfinite(scale) and scale > 0


def _badness(scale: float) -> str:
    if math.isnan(scale):
        return "NaN"
    return "zero" if scale == 0 else "infinite" if math.isinf(scale) else "negative"


def _print_notes(checkpoint: Checkpoint, accounts: list[LayerAccount], console: Console) -> None:
    dialect = checkpoint.architecture.dialect
    parts = {
        name.removeprefix(dialect.block_prefix(account.layer_name)).split(".")[0]
        for account in accounts
        for name in account.left_to_client
    }
    notes = [f"left to the client: {part}" for part in sorted(parts)]
    uncalibrated = [account.layer_name for account in accounts if not account.has_input_scales]
    if uncalibrated:
        notes.append(f"no input scales, load with a calibration file: {', '.join(uncalibrated)}")
    notes += [
        f"not used: the experts of {name}, which is no MoE layer by config.json" for name in checkpoint.stray_layers()
    ]
    notes += [
        f"not used: file {name}, which the checkpoint does not name" for name in checkpoint.files.unindexed_files()
    ]
    notes += [
        f"not used: tensor {name}, which the index does not name" for name in checkpoint.files.unindexed_tensors()
    ]
    used = sum(len(account.tensors) + len(account.left_to_client) for account in accounts)
    notes.append(f"not used: {len(checkpoint.files.names) - used} tensors outside the MoE blocks")
    _print_lines(console, notes)


def _print_lines(console: Console, lines: list[str]) -> None:
    for line in lines[:MAX_LINES]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if len(lines) > MAX_LINES:
        console.print(f"  and {len(lines) - MAX_LINES} more")
