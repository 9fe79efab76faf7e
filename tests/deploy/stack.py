"""The running Compose stack, seen through the docker command."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["ROOT", "SHARDS", "Stack"]

ROOT = Path(__file__).parents[2]
COMPOSE_FILES = (ROOT / "deploy" / "docker-compose.yml", ROOT / "tests" / "deploy" / "docker-compose.test.yml")
SHARDS = ("shard-0-a", "shard-0-b", "shard-1-a", "shard-1-b")


@dataclasses.dataclass(frozen=True)
class Stack:
    """environment: variables under which docker reaches the engine."""

    environment: Mapping[str, str]

    def docker(self, *arguments: str, timeout_s: float = 120) -> str:
        """Run docker; its standard output. Fails the test with the command's own words."""
        done = subprocess.run(
            ["docker", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def compose(self, *arguments: str, timeout_s: float = 300) -> str:
        """Run docker compose on the stack."""
        files = [argument for path in COMPOSE_FILES for argument in ("-f", str(path))]
        return self.docker("compose", *files, *arguments, timeout_s=timeout_s)

    def container(self, service: str) -> str:
        """Container id of a service."""
        return self.compose("ps", "--all", "--quiet", service).strip()

    def health(self, service: str) -> str:
        """What the container's health check says: healthy, unhealthy, starting; or its state when it does not run."""
        shown = self.docker("inspect", "--format", "{{json .State}}", self.container(service))
        state = json.loads(shown)
        return state["Health"]["Status"] if state["Status"] == "running" else state["Status"]

    def wait_healthy(self, service: str, timeout_s: float = 90) -> None:
        """Return when the service is healthy; fail with its log when it is not in time."""
        until_s = time.monotonic() + timeout_s
        while (health := self.health(service)) != "healthy":
            assert time.monotonic() < until_s, f"{service} is {health}: {self.compose('logs', '--tail', '30', service)}"
            time.sleep(0.3)

    def outcomes(self) -> Counter[str]:
        """Requests of the worker so far, by outcome."""
        return Counter(line[2] for line in self._trace())

    def answers(self) -> Counter[int]:
        """Requests of the worker so far, by the version of the weights in the answer; 0: there was none."""
        return Counter(int(line[3]) for line in self._trace())

    def _trace(self) -> list[list[str]]:
        trace = self.docker("exec", self.container("worker"), "cat", "/tmp/requests")
        return [line.split() for line in trace.splitlines(keepends=True) if line.endswith("\n")]

    def order(self, *order: str) -> None:
        """Have every server do what `expertd-server admin` says, all at once."""

        def tell(server: str) -> None:
            self.docker("exec", self.container(server), "expertd-server", "admin", *order)

        with ThreadPoolExecutor(len(SHARDS)) as pool:
            list(pool.map(tell, SHARDS))

    def errors(self) -> list[str]:
        """What the worker printed about requests that failed."""
        lines = self.compose("logs", "--no-log-prefix", "--no-color", "worker").splitlines()
        return [line for line in lines if line.startswith('{"error"')]

    def get(self, service: str, *urls: str) -> list[str]:
        """The bodies of some pages as a service's container sees them."""
        code = (
            f"import json, urllib.request as r; "
            f"print(json.dumps([r.urlopen(url, timeout=10).read().decode() for url in {urls!r}]))"
        )
        bodies: list[str] = json.loads(self.python(service, code))
        return bodies

    def wait_used(self, num_servers: int = len(SHARDS), timeout_s: float = 90) -> None:
        """Return when the worker sends requests to so many servers."""
        until_s = time.monotonic() + timeout_s
        while True:
            (text,) = self.get("worker", "http://127.0.0.1:9091/metrics")
            up = [line for line in text.splitlines() if line.startswith("expertd_client_replica_up{")]
            if sum(line.endswith(" 1.0") for line in up) == num_servers:
                return
            assert time.monotonic() < until_s, f"the worker does not use {num_servers} servers: {up}"
            time.sleep(1)

    def wait_answered(self, timeout_s: float) -> None:
        """Return when every request that the worker has sent until now has ended, well or not."""
        now_s, until_s = time.time(), time.monotonic() + timeout_s
        while True:
            (text,) = self.get("worker", "http://127.0.0.1:9091/metrics")
            lines = [line.split() for line in text.splitlines()]
            (sent_s,) = [float(line[1]) for line in lines if line[0] == "worker_answered_until_timestamp_seconds"]
            if sent_s >= now_s:
                return
            assert time.monotonic() < until_s, f"a request hangs for {time.time() - sent_s:.1f} s"
            time.sleep(0.1)

    def python(self, service: str, code: str) -> str:
        """Run a line of Python inside a service's container."""
        return self.docker("exec", self.container(service), "python3", "-c", code)
