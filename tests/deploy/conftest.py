"""A real Docker engine and the Compose stack, there for one module of tests: its load would slow all others down."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest
import torch
from stack import ROOT, SHARDS, Stack

WHEELS = ROOT / "deploy" / "wheels"
NO_ENGINE = 77
BUILD_TIMEOUT_S = 900
SERVICES = (*SHARDS, "worker", "prometheus")  # Grafana is in no package registry: its files are checked without it


@pytest.fixture(scope="module")
def docker_environment() -> Iterator[Mapping[str, str]]:
    """Environment in which docker and docker compose work; skips, with the reason, where they cannot."""
    if not sys.platform.startswith("linux"):
        pytest.skip("deployment tests need Linux")
    script = ROOT / "scripts" / "docker_engine.sh"
    done = subprocess.run([script, "up"], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == NO_ENGINE:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    environment = dict(os.environ)
    for line in done.stdout.splitlines():
        for assignment in line.removeprefix("export ").split():
            name, _, value = assignment.partition("=")
            environment[name] = value
    try:
        yield environment
    finally:
        subprocess.run([script, "down"], capture_output=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def stack(docker_environment: Mapping[str, str]) -> Iterator[Stack]:
    """The Compose stack, healthy, with the worker sending load."""
    if not torch.__version__.endswith("+cpu") and not list(WHEELS.glob("torch-*.whl")):
        pytest.skip("the image would download several GB of CUDA libraries: put a CPU build of torch in deploy/wheels")
    if not list(WHEELS.glob("torch-*.whl")):
        version = torch.__version__.removesuffix("+cpu")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"torch=={version}", "-d", WHEELS]
        subprocess.run(command, check=True, timeout=300)
    stack = Stack(docker_environment)
    stack.compose("build", "shard-0-a", "prometheus", timeout_s=BUILD_TIMEOUT_S)
    try:
        stack.compose("up", "--detach", "--no-build", "--wait", *SERVICES, timeout_s=300)
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "5")
