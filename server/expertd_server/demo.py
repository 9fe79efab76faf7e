"""`expertd-server demo`: build a small model, serve it in a process of its own, talk to it, check every answer.

The one module of the server that uses the client SDK: it plays the workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

import torch
from rich.console import Console
from rich.table import Table

import expertd
from expertd_server import reference
from expertd_server.checkpoint import open_checkpoint
from expertd_server.demo_model import TEXT, Activity, DemoModel

__all__ = ["run_demo"]

Number = TypeVar("Number", int, float)

NUM_CLIENTS = 6
ROUNDS = 3
"""How often each client sends its share of the text through every layer."""
REQUEST_TOKENS = (1, 16, 7, 32, 3)
"""Sizes that each client's requests go through in turn."""
NUM_LONE_TOKENS = 64
"""Tokens of each layer that are asked for again, one by one, with nobody else about."""
NUM_REFERENCE_TOKENS = 32
"""Tokens of each layer that are held against the specification, which is in no hurry."""
MAX_RELATIVE_ERROR = 0.05
"""Rounding hidden states and activations to FP8 costs 4.6 % on random weights, whoever does it."""
MAX_REFERENCE_ERROR = 0.01
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
REQUEST_TIMEOUT_S = 30.0
POLL_S = 0.05
LOG_WIDTH = 120
"""Columns where there is no terminal to ask."""

NEXT_STEPS = """\
Where to go next
  expertd-server inspect PATH                      what a checkpoint of yours holds, and whether it can be served
  expertd-server serve --checkpoint PATH           serve it
  expertd-server serve --synthetic qwen3-30b-a3b   random weights in the shape of a known model, for benchmarks
  docs/ and examples/                              how to call it from a worker, and how to run it
"""


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True)
class Answer:
    """What came back for some of a layer's tokens."""

    layer: int
    tokens: range
    output: torch.Tensor
    """[len(tokens), H] bfloat16."""
    latency_s: float
    batch_tokens: int
    batch_requests: int


def run_demo() -> int:
    """Run the whole demo, from the main thread (it handles SIGTERM); 0 if every check held, 1 if one did not."""
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    began = time.monotonic()
    # SIGTERM ends Python at once by default, and would leave the server and the files behind.
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        held = _demo(console)
    except (DemoError, expertd.ExpertdError) as error:
        console.print(f"The demo failed: {error}", markup=False, style="red", soft_wrap=True)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    console.print(f"Took {time.monotonic() - began:.1f} s.\n")
    console.print(NEXT_STEPS, highlight=False, soft_wrap=True)
    return 0 if held else 1


def _leave(signum: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _demo(console: Console) -> bool:
    """Everything but the exit code: whether every check held."""
    calibration_text, text = TEXT[: len(TEXT) // 2], TEXT[len(TEXT) // 2 :]
    with tempfile.TemporaryDirectory(prefix="expertd-demo-") as temporary:
        directory = Path(temporary)
        model = DemoModel()
        model.save(directory, calibration_text)
        activities = model.run(text)
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        console.print(
            f"Built a Mixtral checkpoint of {len(activities)} layers in Hugging Face layout, {size / 1e6:.0f} MB:\n"
            f"FP8 with static scales, calibrated on the hidden states of {len(calibration_text)} bytes of Darwin."
        )
        with _server(directory) as (server, port):
            console.print(f"Serving it from process {server.pid} on port {port}.")
            target = f"127.0.0.1:{port}"
            answers = _ask_together(target, activities)
            lone = _ask_alone(target, activities)
            exit_code = _stop(server)
        specified = [_specified(directory, activity) for activity in activities]
    console.print(
        f"Asked for {sum(len(answer.tokens) for answer in answers)} tokens in {len(answers)} requests from "
        f"{NUM_CLIENTS} clients at a time:\nhidden states and router logits of {len(text)} bytes that it was not "
        f"calibrated on.\n"
    )
    reports = [
        _report(activity, expected, [a for a in answers if a.layer == n], [a for a in lone if a.layer == n])
        for n, (activity, expected) in enumerate(zip(activities, specified, strict=True))
    ]
    console.print(_table(reports))
    largest = max(answer.batch_requests for answer in answers)
    checks = {
        f"every layer is within {MAX_RELATIVE_ERROR:.0%} of the model's own block in float32": all(
            report.error < MAX_RELATIVE_ERROR for report in reports
        ),
        f"every layer is within {MAX_REFERENCE_ERROR:.0%} of the specification in float64, FP8 roundings included": all(
            report.reference_error < MAX_REFERENCE_ERROR for report in reports
        ),
        "every token has the same bits alone and in company": all(report.is_bit_equal for report in reports),
        f"requests of different clients shared batches (up to {largest} of them)": largest > 1,
        f"the server stopped cleanly on SIGTERM (exit code {exit_code})": exit_code == 0,
    }
    for what, held in checks.items():
        console.print(f"  [green]ok[/green]      {what}" if held else f"  [red]FAILED[/red]  {what}", highlight=False)
    return all(checks.values())


@contextlib.contextmanager
def _server(checkpoint: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server of the checkpoint in its own process, ready to answer, and its port. Ends with the context."""
    ready_file, log_file = checkpoint / "ready.json", checkpoint / "server.log"
    command = [sys.executable, "-m", "expertd_server", "serve", "--checkpoint", str(checkpoint), "--device", "cpu"]
    command += ["--port", "0", "--ready-file", str(ready_file), "--log-level", "warning"]
    # Options that happen to be set for a server of the user's own are none of the demo's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EXPERTD_")}
    with log_file.open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
    try:
        yield server, _wait_ready(server, ready_file, log_file)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def _wait_ready(server: subprocess.Popen[bytes], ready_file: Path, log_file: Path) -> int:
    """The server's port, once it answers."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready_file.exists():
        if server.poll() is not None:
            raise DemoError(f"the server ended with code {server.returncode} while it started:\n{log_file.read_text()}")
        if time.monotonic() > deadline:
            raise DemoError(f"the server was not ready within {START_TIMEOUT_S:g} s:\n{log_file.read_text()}")
        time.sleep(POLL_S)
    return int(json.loads(ready_file.read_text())["port"])


def _stop(server: subprocess.Popen[bytes]) -> int:
    """Ask the server to finish; its exit code."""
    server.terminate()
    try:
        return server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise DemoError(f"the server did not stop within {STOP_TIMEOUT_S:g} s of SIGTERM") from None


def _ask_together(target: str, activities: list[Activity]) -> list[Answer]:
    """Several clients, each with a connection and a share of the tokens of its own, at the same time."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(expertd.Client(target)) for _ in range(NUM_CLIENTS)]
        for client in clients:
            client.wait_ready(timeout_s=REQUEST_TIMEOUT_S)

        def work(index: int) -> list[Answer]:
            return [
                _ask(clients[index], activities, layer, tokens)
                for _ in range(ROUNDS)
                for layer in range(len(activities))
                for tokens in _share(index, len(activities[0].hidden_states))
            ]

        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            return [answer for answers in pool.map(work, range(NUM_CLIENTS)) for answer in answers]


def _share(client_index: int, num_tokens: int) -> Iterator[range]:
    """One client's tokens, cut into requests of various sizes."""
    at, end = client_index * num_tokens // NUM_CLIENTS, (client_index + 1) * num_tokens // NUM_CLIENTS
    turn = client_index
    while at < end:
        size = REQUEST_TOKENS[turn % len(REQUEST_TOKENS)]
        yield range(at, min(at + size, end))
        at, turn = at + size, turn + 1


def _ask_alone(target: str, activities: list[Activity]) -> list[Answer]:
    """One client, one token at a time."""
    num_tokens = len(activities[0].hidden_states)
    sample = range(0, num_tokens, max(1, num_tokens // NUM_LONE_TOKENS))
    with expertd.Client(target) as client:
        return [
            _ask(client, activities, layer, range(token, token + 1))
            for layer in range(len(activities))
            for token in sample
        ]


def _ask(client: expertd.Client, activities: list[Activity], layer: int, tokens: range) -> Answer:
    activity, rows = activities[layer], slice(tokens.start, tokens.stop)
    began = time.perf_counter()
    result = client.forward(
        activity.layer_name,
        activity.hidden_states[rows],
        routing_logits=activity.logits[rows],
        timeout_s=REQUEST_TIMEOUT_S,
    )
    latency_s = time.perf_counter() - began
    assert result.output is not None
    timing = result.timing
    return Answer(layer, tokens, result.output, latency_s, timing.batch_tokens, timing.batch_requests)


def _specified(checkpoint: Path, activity: Activity) -> torch.Tensor:
    """The layer's output for the first tokens by the specification: [NUM_REFERENCE_TOKENS, H] bfloat16."""
    spec, weights = open_checkpoint(checkpoint).load(activity.layer_name)
    hidden_states, logits = activity.hidden_states[:NUM_REFERENCE_TOKENS], activity.logits[:NUM_REFERENCE_TOKENS]
    return reference.forward(spec, weights, hidden_states, routing_logits=logits).output


@dataclass(frozen=True)
class Report:
    """What the answers of one layer say."""

    layer_name: str
    latencies_s: list[float]
    """Of every request in company, ascending."""
    batch_tokens: list[int]
    """Tokens of the batch that each request ran in, ascending."""
    batch_requests: list[int]
    error: float
    """Relative Frobenius error against the model's own block in float32."""
    reference_error: float
    """The same against the specification."""
    is_bit_equal: bool
    """Whether each token's answers, in every round, in company and alone, are equal to the bit."""


def _report(activity: Activity, specified: torch.Tensor, answers: list[Answer], lone: list[Answer]) -> Report:
    """answers, lone: those of this layer; `answers` cover every token."""
    output = torch.empty_like(activity.output, dtype=torch.bfloat16)
    for answer in answers:
        output[answer.tokens.start : answer.tokens.stop] = answer.output
    return Report(
        layer_name=activity.layer_name,
        latencies_s=sorted(answer.latency_s for answer in answers),
        batch_tokens=sorted(answer.batch_tokens for answer in answers),
        batch_requests=sorted(answer.batch_requests for answer in answers),
        error=_relative_error(output, activity.output),
        reference_error=_relative_error(output[: len(specified)], specified),
        is_bit_equal=all(
            torch.equal(answer.output, output[answer.tokens.start : answer.tokens.stop]) for answer in answers + lone
        ),
    )


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _table(reports: list[Report]) -> Table:
    table = Table(title="Answers over gRPC", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for heading in (
        "requests",
        "p50 ms",
        "p99 ms",
        "tokens\nper batch",
        "requests\nper batch",
        "error,\nmodel",
        "error,\nspec",
    ):
        table.add_column(heading, justify="right")
    table.add_column("alone =\nbatched")
    for report in reports:
        table.add_row(
            report.layer_name,
            str(len(report.latencies_s)),
            f"{_quantile(report.latencies_s, 0.5) * 1e3:.1f}",
            f"{_quantile(report.latencies_s, 0.99) * 1e3:.1f}",
            f"{_quantile(report.batch_tokens, 0.5)}, max {report.batch_tokens[-1]}",
            f"{_quantile(report.batch_requests, 0.5)}, max {report.batch_requests[-1]}",
            f"{report.error:.4f}",
            f"{report.reference_error:.0e}",
            "yes" if report.is_bit_equal else "[red]NO[/red]",
        )
    return table


def _quantile(ascending: Sequence[Number], fraction: float) -> Number:
    return ascending[min(len(ascending) - 1, int(fraction * len(ascending)))]
