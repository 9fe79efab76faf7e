"""One `expertd-server serve` process: started, watched, started again when it ends, asked how it is. No Ray in here."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from expertd_server.config import ENV_PREFIX
from expertd_server.ready import target_of
from expertd_server.tether import tethered

__all__ = ["ServerProcess", "ServerStats", "ServerStatus", "Silence", "parse_stats", "says_serving"]

log = logging.getLogger(__name__)

State = Literal["starting", "serving", "unhealthy", "draining", "stopped"]

_PROBE_TIMEOUT_S = 2.0
_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 30.0
_LONG_LIFE_S = 60.0  # a process that lived for so long starts the pauses over
_SILENCE_LIMIT_S = 30.0  # then it is killed and started again
_KILL_MARGIN_S = 5.0
_NUM_LAST_LINES = 5


@dataclass(frozen=True)
class ServerStats:
    """What a server counted since it started, and its queue now."""

    tokens: float = 0.0
    """Of all batches."""
    busy_s: float = 0.0
    """Time that the device computed."""
    queue_tokens: float = 0.0
    expert_tokens: Mapping[int, float] = field(default_factory=dict)
    """By global expert id, over all layers."""


@dataclass(frozen=True, kw_only=True)
class ServerStatus:
    """How a server is."""

    state: State
    address: str | None = None
    """host:port; None until it is ready."""
    metrics_address: str | None = None
    admin_port: int | None = None
    """Where it takes orders, on its own host's admin_host; None: not ready, or it takes none."""
    pid: int | None = None
    instance_id: str | None = None
    stats: ServerStats = field(default_factory=ServerStats)
    at_s: float = 0.0
    """When, on the server's monotonic clock: rates need no other."""
    num_starts: int = 0
    exit_code: int | None = None
    """Of the process before this one; None: this is the first."""
    last_words: str = ""
    """The last lines that the process before this one wrote to standard error."""


def parse_stats(text: str) -> ServerStats:
    """The statistics in a server's Prometheus text."""
    tokens = busy_s = queue_tokens = 0.0
    expert_tokens: Counter[int] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            match sample.name:
                case "expertd_batch_tokens_sum":
                    tokens += sample.value
                case "expertd_device_busy_seconds_total":
                    busy_s += sample.value
                case "expertd_queue_tokens":
                    queue_tokens += sample.value
                case "expertd_expert_tokens_total":
                    expert_tokens[int(sample.labels["expert"])] += int(sample.value)
    return ServerStats(tokens, busy_s, queue_tokens, dict(expert_tokens))


def says_serving(text: str) -> bool:
    """Whether a server's Prometheus text says that a process of it serves."""
    values = (line.split()[1] for line in text.splitlines() if line.startswith("expertd_serving "))
    return any(float(value) > 0 for value in values)


class Silence:
    """For how long a process has not answered: from the first probe that failed, not from the last that succeeded.

    A gap between probes thus counts for nothing.
    """

    def __init__(self) -> None:
        self._since_s: float | None = None

    def after(self, answered: bool, now_s: float) -> float:
        """Seconds of silence after a probe that ended at now_s, whatever it was that was answered."""
        if answered:
            self._since_s = None
            return 0.0
        if self._since_s is None:
            self._since_s = now_s
        return now_s - self._since_s


class ServerProcess:
    """Keeps one server running until `drain`. Thread-safe."""

    def __init__(
        self,
        flags: Sequence[str],
        host: str,
        *,
        shutdown_grace_s: float,
        start_timeout_s: float,
        is_tls: bool = False,
    ) -> None:
        """flags: of `serve`, without host, ports and ready file. host: where it listens and is reached.

        start_timeout_s: a process that is not ready so long after its start is killed, and started again.
        is_tls: what the server says of its health is then read from its metrics alone, for want of a certificate that
        it would trust.
        """
        self._flags, self._host, self._grace_s, self._is_tls = list(flags), host, shutdown_grace_s, is_tls
        self._start_timeout_s = start_timeout_s
        self._directory = tempfile.TemporaryDirectory(prefix="expertd-server-", ignore_cleanup_errors=True)
        self._ready_file = Path(self._directory.name) / "ready.json"
        self._lock = threading.Lock()
        self._draining = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._facts: dict[str, object] = {}
        self._channel: grpc.Channel | None = None
        self._num_starts = 0
        self._started_s = 0.0
        self._exit_code: int | None = None
        self._last_words = ""
        self._silence = Silence()
        # NOTE: the processes die with this thread, see tether: it has to live as long as they should.
        self._supervisor = threading.Thread(target=self._supervise, name="expertd-supervisor", daemon=True)
        self._supervisor.start()

    def status(self) -> ServerStatus:
        """Ask the process how it is, over its own ports."""
        with self._lock:
            process = self._process
            facts = self._read_facts() if process is not None else {}
            channel, silence, started_s = self._channel, self._silence, self._started_s
        state, stats = self._probe(process, facts, channel)
        now_s = time.monotonic()
        # A server that answers NOT_SERVING does as it was told, as after `admin drain`: it is left alone.
        silent_s = silence.after(stats is not None, now_s)
        if process is not None and silent_s > _SILENCE_LIMIT_S:
            log.error("pid %d has not answered for %.0f s: killed", process.pid, silent_s)
            process.kill()
        elif process is not None and state == "starting" and now_s - started_s > self._start_timeout_s:
            log.error("pid %d is not ready after start_timeout_s, %.0f s: killed", process.pid, self._start_timeout_s)
            process.kill()
        return ServerStatus(
            state=state,
            address=str(facts["address"]) if facts else None,
            metrics_address=_metrics_address(self._host, facts) if facts else None,
            admin_port=_port(facts.get("admin_port")),
            pid=None if process is None else process.pid,
            instance_id=str(facts["instance_id"]) if facts else None,
            stats=stats or ServerStats(),
            at_s=now_s,
            num_starts=self._num_starts,
            exit_code=self._exit_code,
            last_words=self._last_words,
        )

    def drain(self) -> bool:
        """Let the process finish what it has and end; it is not started again. Whether it ended in time."""
        self._draining.set()
        with self._lock:
            process = self._process
        drained = True
        if process is not None:
            process.terminate()
            try:
                drained = process.wait(self._grace_s + _KILL_MARGIN_S) == 0
            except subprocess.TimeoutExpired:
                process.kill()
                drained = False
        self._supervisor.join(_KILL_MARGIN_S)
        self._directory.cleanup()
        return drained

    def _supervise(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._draining.is_set():
            started_s = time.monotonic()
            process = self._start()
            if process is None:
                return
            last_lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)
            assert process.stderr is not None
            with process.stderr:
                for line in process.stderr:
                    sys.stderr.write(line)
                    last_lines.append(line.strip())
            code = process.wait()
            with self._lock:
                self._process = None
                self._facts = {}
                self._exit_code, self._last_words = code, "\n".join(last_lines)
                if self._channel is not None:
                    self._channel.close()
                    self._channel = None
            if not self._draining.is_set():
                long_life = time.monotonic() - started_s > _LONG_LIFE_S
                pause_s = _FIRST_PAUSE_S if long_life else min(2 * pause_s, _MAX_PAUSE_S)
                log.error("pid %d ended with exit code %d; starting again in %.0f s", process.pid, code, pause_s)
                self._draining.wait(pause_s)

    def _start(self) -> subprocess.Popen[str] | None:
        command = [sys.executable, "-m", "expertd_server", "serve", *self._flags]
        command += ["--host", self._host, "--port", "0", "--metrics-port", "0", "--admin-port", "0"]
        command += ["--ready-file", str(self._ready_file)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        with self._lock:
            if self._draining.is_set():
                return None
            self._ready_file.unlink(missing_ok=True)
            self._silence = Silence()
            self._num_starts += 1
            self._started_s = time.monotonic()
            self._process = subprocess.Popen(
                tethered(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
                text=True,
                errors="replace",
            )
            return self._process

    def _read_facts(self) -> dict[str, object]:
        """What the process said when it was ready; empty until then. Holds the lock."""
        if not self._facts and self._ready_file.exists():
            self._facts = json.loads(self._ready_file.read_text())
            self._channel = None if self._is_tls else grpc.insecure_channel(str(self._facts["address"]))
        return self._facts

    def _probe(
        self, process: subprocess.Popen[str] | None, facts: Mapping[str, object], channel: grpc.Channel | None
    ) -> tuple[State, ServerStats | None]:
        """The state and the statistics; None: it should have answered, and did not."""
        if self._draining.is_set():
            return ("stopped" if process is None else "draining"), ServerStats()
        if process is None or not facts:
            return "starting", ServerStats()
        try:
            url = f"http://{_metrics_address(self._host, facts)}/metrics"
            with urllib.request.urlopen(url, timeout=_PROBE_TIMEOUT_S) as response:
                text = response.read().decode()
            stats = parse_stats(text)
            if not says_serving(text):
                return "unhealthy", stats
            if channel is not None:
                request = health_pb2.HealthCheckRequest()
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_PROBE_TIMEOUT_S)
                if answer.status != health_pb2.HealthCheckResponse.SERVING:
                    return "unhealthy", stats
        except (OSError, grpc.RpcError, ValueError):
            return "unhealthy", None
        return "serving", stats


def _metrics_address(host: str, facts: Mapping[str, object]) -> str:
    port = _port(facts["metrics_port"])
    assert port is not None, "the command asks for metrics"
    return target_of(host, port)


def _port(fact: object) -> int | None:
    return fact if isinstance(fact, int) else None
