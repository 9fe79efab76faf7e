"""A worker that keeps a tier of expert servers busy through ExpertGroup and checks every answer it gets.

It sends the same few requests over and over from several threads: the first answer to each in a version of the weights
must be repeated to the bit, whichever replicas give it, and answers in another version must differ from it. Prints one
line of JSON a second; Prometheus metrics are on METRICS_PORT.

Environment: TARGETS "host:port,host:port,..."; CONCURRENCY; NUM_TOKENS; SEED; RATE, requests a second (0: each thread
sends when its last answer is there); METRICS_PORT (9091); TRACE_FILE, which gets a line for each request as it ends:
"end_s latency_s outcome weights_version", with version 0 where there is no answer.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Metric, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

import expertd

NUM_DISTINCT_REQUESTS = 8
REPORT_INTERVAL_S = 1.0

requests_total = Counter(
    "worker_requests", "Requests sent, by outcome: ok, wrong_bits or the error's class.", ["outcome"]
)
request_seconds = Histogram(
    "worker_request_seconds",
    "From call to answer.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
)
tokens_total = Counter("worker_tokens", "Tokens in answered requests.")
answered_until = Gauge(
    "worker_answered_until_timestamp_seconds", "Every request that was sent before has ended, well or not; Unix time."
)


class GroupMetrics(Collector):
    """The group's own counters, named expertd_client_…, among those of this process."""

    def __init__(self, group: expertd.ExpertGroup) -> None:
        self.group = group

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        yield from text_string_to_metric_families(self.group.metrics_text())

    def describe(self) -> Iterable[Metric]:
        """See Collector. Nothing: the names are not known to the registry beforehand."""
        return []


class Load:
    """Sends requests and compares answers until told to stop."""

    def __init__(
        self, group: expertd.ExpertGroup, num_tokens: int, seed: int, rate: float = 0.0, trace_file: str = ""
    ) -> None:
        """rate: requests a second of all threads together; 0: each thread sends when its last answer is there."""
        self.group = group
        self.trace = open(trace_file, "a", buffering=1) if trace_file else None  # noqa: SIM115 lives with the process
        self.rate = rate
        self.next_start_s = time.monotonic()
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.latencies_s: list[float] = []
        self.outcomes: dict[str, int] = {}
        self.sent_s: dict[int, float] = {}
        """Unix time at which each thread sent the request that it waits for, if it does."""
        answered_until.set_function(self.answered_until_s)
        self.expected: dict[int, dict[int, bytes]] = {}
        """By request and version of the weights."""
        rng = np.random.default_rng(seed)
        layers = group.layers()
        self.requests = []
        for index in range(NUM_DISTINCT_REQUESTS):
            layer = layers[index % len(layers)]
            hidden_states = rng.standard_normal((num_tokens, layer.hidden_size), np.float32).astype(ml_dtypes.bfloat16)
            logits = rng.standard_normal((num_tokens, layer.num_experts), np.float32)
            self.requests.append((layer.name, hidden_states, logits))

    def run(self, first: int) -> None:
        """One thread's work."""
        for index in itertools.islice(itertools.cycle(range(NUM_DISTINCT_REQUESTS)), first, None):
            self.await_turn()
            if self.stopping.is_set():
                return
            layer, hidden_states, logits = self.requests[index]
            with self.lock:
                self.sent_s[first] = time.time()
            start_s = time.monotonic()
            version = 0
            try:
                result = self.group.forward(layer, hidden_states, routing_logits=logits, timeout_s=20)
                version = result.weights_version
                outcome = "ok" if self.is_expected(index, version, result.output.tobytes()) else "wrong_bits"
            except expertd.ExpertdError as error:
                outcome = type(error).__name__
                print(json.dumps({"error": outcome, "message": str(error)}), flush=True)
            self.count(outcome, version, time.monotonic() - start_s, len(hidden_states))
            with self.lock:
                del self.sent_s[first]

    def answered_until_s(self) -> float:
        """Unix time before which no request was sent that has not ended."""
        with self.lock:
            return min(self.sent_s.values(), default=time.time())

    def await_turn(self) -> None:
        """Wait until the rate allows another request. Turns that were missed are not made up for."""
        if not self.rate:
            return
        with self.lock:
            turn_s = self.next_start_s = max(self.next_start_s + 1 / self.rate, time.monotonic())
        self.stopping.wait(turn_s - time.monotonic())

    def is_expected(self, index: int, version: int, answer: bytes) -> bool:
        """Whether this answer repeats the first one to the same request in this version, and no other version's."""
        with self.lock:
            answers = self.expected.setdefault(index, {})
            return answers.setdefault(version, answer) == answer and len(set(answers.values())) == len(answers)

    def count(self, outcome: str, version: int, latency_s: float, num_tokens: int) -> None:
        """Account for one request."""
        requests_total.labels(outcome).inc()
        request_seconds.observe(latency_s)
        if outcome == "ok":
            tokens_total.inc(num_tokens)
        with self.lock:
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
            self.latencies_s.append(latency_s)
            if self.trace is not None:
                self.trace.write(f"{time.time():.4f} {latency_s:.5f} {outcome} {version}\n")

    def report(self) -> None:
        """Print what happened since the last report."""
        with self.lock:
            latencies_s, self.latencies_s = sorted(self.latencies_s), []
            totals = dict(self.outcomes)
        line = {"time": round(time.time(), 3), "requests": len(latencies_s), "totals": totals}
        if latencies_s:
            line["p50_ms"] = round(1e3 * latencies_s[len(latencies_s) // 2], 2)
            line["p99_ms"] = round(1e3 * latencies_s[int(len(latencies_s) * 0.99)], 2)
        print(json.dumps(line), flush=True)


def main() -> None:
    start_http_server(int(os.environ.get("METRICS_PORT", "9091")))
    with expertd.ExpertGroup(os.environ["TARGETS"].split(",")) as group:
        group.wait_ready(timeout_s=120)
        REGISTRY.register(GroupMetrics(group))
        load = Load(
            group,
            int(os.environ.get("NUM_TOKENS", "32")),
            int(os.environ.get("SEED", "0")),
            float(os.environ.get("RATE", "0")),
            os.environ.get("TRACE_FILE", ""),
        )
        signal.signal(signal.SIGTERM, lambda *_: load.stopping.set())
        signal.signal(signal.SIGINT, lambda *_: load.stopping.set())
        concurrency = int(os.environ.get("CONCURRENCY", "4"))
        threads = [threading.Thread(target=load.run, args=(first,)) for first in range(concurrency)]
        for thread in threads:
            thread.start()
        while not load.stopping.wait(REPORT_INTERVAL_S):
            load.report()
        for thread in threads:
            thread.join()
        load.report()


if __name__ == "__main__":
    main()
