"""What bench_service.py shows: its tables, and the plot of latency over throughput."""

from __future__ import annotations

import argparse
from typing import Any

from _requests import RequestShape
from _service_measure import Point
from rich.table import Table

COLUMNS = (
    "front-ends",
    "tokens",
    "KiB in/out",
    "load",
    "p50 µs",
    "p99 µs",
    "req/s",
    "ktok/s",
    "GB/s",
    "CPU µs/req",
    "front-ends",
    "engine",
    "echo",
    "clients",
    "MiB",
    "tok/batch",
    "device ktok/s",
    "of device",
    "p50 / echo",
    "req/s / echo",
)


def new_table(device: str) -> Table:
    """For `add_row`."""
    table = Table(title=f"expertd over gRPC, backend {device}")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column != "load" else "left")
    return table


def add_row(table: Table, shape: RequestShape, row: dict[str, Any]) -> None:
    """One line of the table; a load that met errors says so."""
    ours = row["expertd"]
    failed, cpu_us = sum(ours["errors"].values()), ours["cpu_us_per_request"]
    table.add_row(
        str(row["frontends"]),
        str(shape.num_tokens),
        f"{shape.request_bytes / 1024:.0f}/{shape.answer_bytes / 1024:.0f}",
        row["load"] + (f" [{failed} failed: {', '.join(ours['errors'])}]" if failed else ""),
        f"{ours['latency_us']['p50']:.0f}",
        f"{ours['latency_us']['p99']:.0f}",
        f"{ours['requests_per_s']:.0f}",
        f"{row['tokens_per_s'] / 1e3:.0f}",
        f"{row['bytes_per_s'] / 1e9:.2f}",
        f"{cpu_us['all']:.0f}",
        *(f"{cpu_us[role]:.0f}" if role in cpu_us else "" for role in ("front-ends", "engine")),
        f"{row['echo']['cpu_us_per_request']['all']:.0f}",
        f"{cpu_us['clients']:.0f}",
        f"{ours['rss_mib'].get('front-ends', ours['rss_mib']['server']):.0f}",
        *device_columns(ours["batches"], row["tokens_per_s"]),
        f"{row['p50_over_echo']:.2f}",
        f"{row['throughput_over_echo']:.2f}",
    )


def device_columns(batches: dict[str, float], tokens_per_s: float) -> tuple[str, str, str]:
    """The mean batch, what the device alone would do with such ones, and how much of that was reached."""
    if not batches:
        return "", "", ""
    alone = batches["device_tokens_per_s"]
    return f"{batches['mean_batch_tokens']:.0f}", f"{alone / 1e3:.0f}", f"{tokens_per_s / alone:.2f}"


def peer_table(shape: RequestShape, medians: dict[str, dict[str, Point]], rows: dict[str, dict[str, float]]) -> Table:
    """A line for each server; one that met errors says so."""
    table = Table(
        title=f"{shape.num_tokens} tokens a request, {shape.request_bytes / 1024:.0f} KiB in, "
        f"{shape.answer_bytes / 1024:.0f} KiB out"
    )
    table.add_column("server")
    for column in ("lone p50 µs", "req/s", "CPU µs/req", "p50 / ours", "ours / req/s", "CPU / ours"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        errors = medians[name]["lone"].errors | medians[name]["saturated"].errors
        table.add_row(
            name + (f" [failed: {', '.join(errors)}]" if errors else ""),
            f"{row['lone_p50_us']:.0f}",
            f"{row['saturated_requests_per_s']:.0f}",
            f"{row['cpu_us_per_request']:.0f}",
            f"{row['p50_over_ours']:.2f}",
            f"{row['ours_over_throughput']:.2f}",
            f"{row['cpu_over_ours']:.2f}",
        )
    return table


def plot(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Latency over throughput of the open loop of the first transport, one panel for each request size."""
    import matplotlib as mpl  # noqa: PLC0415 (only where a plot is asked for)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    _, axes = plt.subplots(1, len(options.tokens), figsize=(4.2 * len(options.tokens), 3.6), squeeze=False)
    for axis, num_tokens in zip(axes[0], options.tokens, strict=True):
        layout = options.frontends[-1]
        wanted = num_tokens, layout, options.transports[0]
        rows = [
            row
            for row in results
            if "share" in row and (row["tokens"], row["frontends"], row["load_options"]["transport"]) == wanted
        ]
        for who, colour in (("expertd", "tab:blue"), ("echo", "tab:grey")):
            for percentile, style in (("p50", "-"), ("p99", "--")):
                x = [row[who]["requests_per_s"] * num_tokens / 1e3 for row in rows]
                y = [row[who]["latency_us"][percentile] / 1e3 for row in rows]
                axis.plot(x, y, style, color=colour, marker=".", label=f"{who} {percentile}")
        axis.set(
            title=f"{num_tokens} tokens a request", xlabel="thousand tokens / s", ylabel="latency, ms", yscale="log"
        )
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    plt.tight_layout()
    plt.savefig(options.plot, dpi=120)
