"""The running Compose stack, seen through the docker command."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

__all__ = ["ROOT", "SHARDS", "Stack"]

ROOT = Path(__file__).parents[2]
COMPOSE_FILE = ROOT / "deploy" / "docker-compose.yml"
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
        return self.docker("compose", "-f", str(COMPOSE_FILE), *arguments, timeout_s=timeout_s)

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

    def reports(self) -> list[dict[str, object]]:
        """Every line that the worker has printed, oldest first."""
        lines = self.compose("logs", "--no-log-prefix", "--no-color", "worker").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def python(self, service: str, code: str) -> str:
        """Run a line of Python inside a service's container."""
        return self.docker("exec", self.container(service), "python3", "-c", code)
