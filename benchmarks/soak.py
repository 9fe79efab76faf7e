"""Ten minutes of everything at once: does the server answer right, and is it afterwards what it was before?

    python benchmarks/soak.py                                   ten minutes on the CPU
    python benchmarks/soak.py --minutes 1 --frontends 2
    python benchmarks/soak.py --gpu --json soak.json            the CUDA backend

Clients of all kinds, each a process of its own (`_soak_worker.py`): steady ones over shared memory and over gRPC, one
with prepared calls, several of each thread in flight, one that cancels and sets deadlines that cannot be met, one whose
every request is wrong, and victims of either transport that are killed with -9 in mid-stream and replaced. All request
sizes from 1 to 512 tokens.

First a rehearsal of some seconds, in which is taken what is taken once and kept. Passes when every answer had the bits
of the operator, run on the same kind of device in this process; when nothing failed that should not; when memory (RSS
of the server's processes), open files, mappings of shared memory and GPU memory stayed flat and nothing of the server's
lay in /dev/shm; and when, at the end, nothing is in flight and every case is answered once more. Exits with 1 if not.

RSS counts as flat when its median over the last quarter of the run is at most 10 % and 32 MiB above that of the second.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import psutil
import torch
from _common import header, write_json
from _soak_worker import Case, cases
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import expertd
from expertd_server.backend import select_backend
from expertd_server.layer import MoELayer
from expertd_server.synthetic import synthetic_layers

HERE = Path(__file__).resolve().parent
START_TIMEOUT_S = 300.0
SETTLE_TIMEOUT_S = 60.0
SAMPLE_S = 1.0
REHEARSAL_S = 5.0
CLIENTS = (
    ("steady", "shm", 3),
    ("steady", "grpc", 3),
    ("prepared", "shm", 2),
    ("impatient", "auto", 6),
    ("malformed", "grpc", 1),
)
"""That live to the end: kind, transport, threads."""
VICTIM_LIFE_S = (0.1, 4.0)
"""From its first answer to its end."""
EXPECTED = {"ok", "cancelled", "late", "refused"}
RSS_SHARE, RSS_SLACK_BYTES = 1.10, 32 * 2**20
REGION = "expertd-region"
"""In the name of the memory that clients share."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the server's processes hold at a time."""

    at_s: float
    rss_bytes: int
    open_files: int
    regions: int
    """Mappings of memory that clients share."""
    shm_files: int
    """Mappings of files in /dev/shm."""
    gpu_bytes: int


class Server:
    """expertd-server, and what can be seen of it from outside."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._ready = folder / "ready.json"
        command = [sys.executable, "-m", "expertd_server", "serve", "--port=0", "--metrics-port=0"]
        command += [f"--ready-file={self._ready}", f"--synthetic={options.preset}", "--log-level=error"]
        command += [f"--device={'cuda' if options.gpu else 'cpu'}", "--max-batch-tokens=1024"]
        if options.frontends:
            command.append(f"--frontends={options.frontends}")
        self._is_gpu = options.gpu
        self.popen = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.target = ""
        self.processes: list[psutil.Process] = []

    def wait_ready(self) -> None:
        """Return when every layer answers; exits when that takes too long."""
        until_s = time.monotonic() + START_TIMEOUT_S
        while not self._ready.exists():
            if time.monotonic() > until_s or self.popen.poll() is not None:
                sys.exit(f"the server was not ready within {START_TIMEOUT_S:.0f} s")
            time.sleep(0.05)
        facts = json.loads(self._ready.read_text())
        self.target = facts["address"]
        self._metrics = f"http://127.0.0.1:{facts['metrics_port']}/metrics"
        self.processes = [psutil.Process(self.popen.pid)]
        self.processes += self.processes[0].children(recursive=True)

    def sample(self) -> Sample:
        """Look at all its processes."""
        maps = [Path(f"/proc/{process.pid}/maps").read_text() for process in self.processes]
        gpu_bytes = 0
        if self._is_gpu:
            free, total = torch.cuda.mem_get_info()
            gpu_bytes = total - free
        return Sample(
            time.monotonic(),
            sum(process.memory_info().rss for process in self.processes),
            sum(process.num_fds() for process in self.processes),
            sum(text.count(REGION) for text in maps),
            sum(text.count(" /dev/shm/") for text in maps),
            gpu_bytes,
        )

    def open_files(self) -> Counter[str]:
        """What its processes have open, by process and kind; to say what is left, if anything is."""
        files: Counter[str] = Counter()
        for number, process in enumerate(self.processes):
            for entry in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):  # closed a moment ago
                    kind = re.sub(r"\[\d+\]|\d+", "N", str(entry.readlink()))
                    files[f"process {number}: {kind}"] += 1
        return files

    def gauges(self) -> dict[str, float]:
        """What is under way: all of it is 0 when nothing is."""
        with urllib.request.urlopen(self._metrics, timeout=10) as page:
            families = text_string_to_metric_families(page.read().decode())
        names = ("in_flight_requests", "open_streams", "queue_requests", "queue_tokens", "slots_in_use")
        wanted = {f"expertd_{name}": name for name in names}
        return {
            wanted[family.name]: sum(sample.value for sample in family.samples)
            for family in families
            if family.name in wanted
        }

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        self.popen.terminate()
        try:
            return self.popen.wait(60)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return self.popen.wait()


class Client:
    """A process of _soak_worker.py, and what it last said."""

    def __init__(self, name: str, job: dict[str, Any], folder: Path) -> None:
        self.name = name
        self.outcomes: Counter[str] = Counter()
        job_file = folder / f"{name}.json"
        job_file.write_text(json.dumps(job))
        command = [sys.executable, str(HERE / "_soak_worker.py"), str(job_file)]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # half a line of one that was killed
                self.outcomes = Counter(json.loads(line))

    def kill(self) -> None:
        """kill -9, with requests under way."""
        self.popen.send_signal(signal.SIGKILL)
        self._end()

    def finish(self) -> int:
        """Let it finish what it has; its exit code."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        try:
            self.popen.wait(180)
        except subprocess.TimeoutExpired:
            self.popen.kill()
        return self._end()

    def _end(self) -> int:
        code = self.popen.wait()
        self._reader.join(10)
        for pipe in (self.popen.stdin, self.popen.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        return code


def main() -> None:
    """Run it, print what was seen, judge it."""
    options = parse_options()
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(options, folder)
        try:
            console.print("the operator's answers ...")
            job = answers_of(options, folder)
            server.wait_ready()
            result = soak(server, job | {"target": server.target}, options, folder, console)
        finally:
            result_code = server.stop()
        result["checks"]["the server ended with exit code 0"] = result_code == 0
        result["checks"]["nothing of expertd is left in /dev/shm"] = not list(Path("/dev/shm").glob("*expertd*"))
    show(result, console)
    if options.json is not None:
        said = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        write_json(options.json, {**header(), "options": said, **result})
    if not all(result["checks"].values()):
        sys.exit(1)


def answers_of(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compute every case's answer with the operator; returns what the jobs of all clients have in common."""
    backend = select_backend("cuda" if options.gpu else "cpu")
    name, spec, weights = next(iter(synthetic_layers(options.preset, device=backend.device)))
    layer = MoELayer(name, backend.prepare(spec, weights), backend, 1)
    shape = (spec.hidden_size, spec.num_experts, spec.top_k)
    answers = {case.name: operator(layer, case) for case in cases(*shape)}
    np.savez(folder / "answers.npz", **answers)  # type: ignore[arg-type]
    return {"layer": name, "shape": shape, "answers": str(folder / "answers.npz")}


def operator(layer: MoELayer, case: Case) -> np.ndarray[Any, Any]:
    """The bytes of a case's output."""
    kinds = {np.dtype(ml_dtypes.float8_e4m3fn): torch.float8_e4m3fn, np.dtype(ml_dtypes.bfloat16): torch.bfloat16}
    device = layer.backend.device
    hidden = torch.from_numpy(case.hidden_states.view(np.uint8)).view(kinds[case.hidden_states.dtype]).to(device)
    routing: dict[str, torch.Tensor] = {}
    for field in ("routing_logits", "topk_ids", "topk_weights"):
        array = getattr(case, field)
        if array is not None:
            tensor = torch.from_numpy(array).to(device)
            routing[field] = tensor.to(torch.bfloat16) if field == "topk_weights" else tensor
    answer = layer.forward(hidden, **routing, output_dtype=getattr(torch, case.output_dtype))
    assert answer.output is not None
    flat: np.ndarray[Any, Any] = answer.output.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def soak(
    server: Server, job: dict[str, Any], options: argparse.Namespace, folder: Path, console: Console
) -> dict[str, Any]:
    """Load, look, let go, look again."""
    ask_once(server, job, options)
    console.print("a rehearsal, so that what is taken once and kept is there ...")
    rehearse(job, folder)
    settled(server)
    before, files_before = server.sample(), server.open_files()
    clients = start_all(job, folder)
    chance = random.Random(1)
    victims = {transport: start_victim(transport, job, folder, chance) for transport in ("shm", "grpc")}
    wait_for_answers(list(victims.values()))
    dies_s = dict.fromkeys(victims, 0.0)
    killed, num_killed = Counter[str](), 0
    samples: list[Sample] = []
    begin_s = time.monotonic()
    end_s = begin_s + 60 * options.minutes
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("soaking", total=60 * options.minutes)
        while time.monotonic() < end_s:
            for transport, victim in list(victims.items()):
                if not victim.outcomes:
                    continue
                if not dies_s[transport]:
                    dies_s[transport] = time.monotonic() + chance.uniform(*VICTIM_LIFE_S)
                elif dies_s[transport] <= time.monotonic():
                    victim.kill()
                    killed += victim.outcomes
                    num_killed += 1
                    victims[transport], dies_s[transport] = start_victim(transport, job, folder, chance), 0.0
            samples.append(server.sample())
            answered = killed["ok"] + sum(client.outcomes["ok"] for client in clients)
            rss_mib = samples[-1].rss_bytes / 2**20
            progress.update(
                bar,
                completed=time.monotonic() - begin_s,
                description=f"{answered} answers, {num_killed} killed, RSS {rss_mib:.0f} MiB",
            )
            time.sleep(SAMPLE_S)
    for victim in victims.values():
        victim.kill()
        killed += victim.outcomes
        num_killed += 1
    codes = {client.name: client.finish() for client in clients}
    gauges = settled(server)
    ask_once(server, job, options)
    is_idle = not any(settled(server).values())
    after = wait_for_files(server, before)
    by_client = {client.name: dict(client.outcomes) for client in clients} | {"victims": dict(killed)}
    outcomes = sum((Counter(each) for each in by_client.values()), Counter[str]())
    early, late = quarters([sample.rss_bytes for sample in samples])
    gpu_early, gpu_late = quarters([sample.gpu_bytes for sample in samples])
    checks = {
        "every answer had the operator's bits": outcomes["wrong"] == 0 and outcomes["ok"] > 0,
        "nothing failed that should not": set(outcomes) <= EXPECTED,
        "every kind of client got something done": all(client.outcomes for client in clients),
        "no client failed": not any(codes.values()),
        "nothing is in flight at the end": not any(gauges.values()) and is_idle,
        "RSS is flat": late <= RSS_SHARE * early + RSS_SLACK_BYTES,
        "no open file is left": after.open_files <= before.open_files,
        "no mapping of shared memory is left": after.regions == 0,
        "nothing of the server's lay in /dev/shm": not any(sample.shm_files for sample in samples),
        "GPU memory is flat": gpu_late <= gpu_early,
    }
    return {
        "seconds": time.monotonic() - begin_s,
        "killed_clients": num_killed,
        "outcomes": by_client,
        "gauges": gauges,
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(after),
        "files_left": dict(server.open_files() - files_before),
        "most": {
            "rss_bytes": max(sample.rss_bytes for sample in samples),
            "open_files": max(sample.open_files for sample in samples),
            "regions": max(sample.regions for sample in samples),
        },
        "rss_quarters": [early, late],
        "samples": [dataclasses.asdict(sample) for sample in samples[:: max(1, len(samples) // 60)]],
        "checks": checks,
    }


def rehearse(job: dict[str, Any], folder: Path) -> None:
    """All clients for some seconds."""
    clients = start_all(job, folder)
    time.sleep(REHEARSAL_S)
    for client in clients:
        client.finish()


def start_all(job: dict[str, Any], folder: Path) -> list[Client]:
    """Every client that lives to the end, each with an answer."""
    clients = [start(f"{kind}-{transport}", kind, transport, count, job, folder) for kind, transport, count in CLIENTS]
    wait_for_answers(clients)
    return clients


def start(  # noqa: PLR0917
    name: str, kind: str, transport: str, threads: int, job: dict[str, Any], folder: Path, seed: int = 0
) -> Client:
    """A client process."""
    return Client(name, {**job, "kind": kind, "transport": transport, "threads": threads, "seed": seed}, folder)


def start_victim(transport: str, job: dict[str, Any], folder: Path, chance: random.Random) -> Client:
    """A client that is to be killed."""
    return start(f"victim-{transport}", "steady", transport, 4, job, folder, chance.randrange(10**6))


def wait_for_answers(clients: list[Client]) -> None:
    """Return when each has one: on a busy machine they take their time to start."""
    until_s = time.monotonic() + START_TIMEOUT_S
    while not all(client.outcomes for client in clients):
        if time.monotonic() > until_s or any(client.popen.poll() is not None for client in clients):
            sys.exit(f"no answer from {[client.name for client in clients if not client.outcomes]}")
        time.sleep(0.1)


def ask_once(server: Server, job: dict[str, Any], options: argparse.Namespace) -> None:
    """Every case once over every transport and, by chance of the kernel, every front-end; exits when one is wrong."""
    answers = np.load(job["answers"])
    for transport in ("shm", "grpc", "unary"):
        for _ in range(2 * options.frontends or 1):
            config = expertd.ClientConfig(server.target, transport=transport)
            with expertd.Client(config) as client:
                for case in cases(*job["shape"]):
                    answer = client.forward(job["layer"], **case.arguments())
                    if answer.output.tobytes() != answers[case.name].tobytes():
                        sys.exit(f"case {case.name} over {transport} has other bits than the operator")


def settled(server: Server) -> dict[str, float]:
    """The gauges when nothing is under way any more, or after a minute."""
    until_s = time.monotonic() + SETTLE_TIMEOUT_S
    while any((gauges := server.gauges()).values()) and time.monotonic() < until_s:
        time.sleep(0.1)
    return gauges


def wait_for_files(server: Server, before: Sample) -> Sample:
    """How it is when what belongs to closed connections is closed, or after a minute."""
    until_s = time.monotonic() + SETTLE_TIMEOUT_S
    while (now := server.sample()).open_files > before.open_files or now.regions:
        if time.monotonic() > until_s:
            break
        time.sleep(0.5)
    return now


def quarters(values: list[int]) -> tuple[float, float]:
    """Medians of the second and of the last quarter."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[quarter : 2 * quarter] or values), statistics.median(values[-quarter:])


def show(result: dict[str, Any], console: Console) -> None:
    """Tables."""
    outcomes = Table(title=f"{result['seconds']:.0f} s, {result['killed_clients']} clients killed")
    outcomes.add_column("client")
    outcomes.add_column("what came of its requests")
    for client, counts in result["outcomes"].items():
        outcomes.add_row(client, ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    console.print(outcomes)
    held = Table("", "before", "most", "after")
    for name, unit in (("rss_bytes", 2**20), ("open_files", 1), ("regions", 1)):
        cells = (result[when][name] / unit for when in ("before", "most", "after"))
        held.add_row(name.replace("rss_bytes", "RSS, MiB"), *(f"{cell:.0f}" for cell in cells))
    early, late = (value / 2**20 for value in result["rss_quarters"])
    held.add_row("RSS, MiB: second quarter, last", f"{early:.0f}", "", f"{late:.0f}")
    console.print(held)
    for kind, count in result["files_left"].items():
        console.print(f"more open than before: {count} of {kind}")
    for check, is_met in result["checks"].items():
        console.print(f"[{'green' if is_met else 'red'}]{'yes' if is_met else 'NO '}[/] {check}")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--gpu", action="store_true", help="the CUDA backend instead of the CPU's")
    parser.add_argument("--frontends", type=int, default=0, help="front-end processes (default: 0)")
    parser.add_argument("--preset", help="shape of the layer (default: tiny, with --gpu qwen3-30b-a3b)")
    parser.add_argument("--json", type=Path, help="write what was seen here")
    options = parser.parse_args()
    if options.preset is None:
        options.preset = "qwen3-30b-a3b" if options.gpu else "tiny"
    return options


if __name__ == "__main__":
    main()
