"""What `pip install ./client` brings to an empty environment: no torch, and nothing that needs a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(700)
ROOT = Path(__file__).parents[2]
INSTALL_TIMEOUT_S = 600  # a dozen seconds on an idle machine
NO_NETWORK = ("NewConnectionError", "Temporary failure in name resolution", "Network is unreachable", "ConnectTimeout")
PROBE = """
import importlib.metadata, json, expertd
client = expertd.Client("127.0.0.1:1")
client.close()
print(json.dumps(sorted(d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions())))
"""


def test_the_client_installs_from_wheels_alone_and_brings_no_torch(tmp_path: Path) -> None:
    source = tmp_path / "client"
    shutil.copytree(ROOT / "client", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=60)
    python = environment / "bin" / "python"
    # No compiler is on the path, and what is no wheel is refused but for the client itself.
    variables = {**os.environ, "PATH": str(environment / "bin"), "CC": "/bin/false", "CXX": "/bin/false"}
    variables |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ONLY_BINARY": ":all:"}
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    command += ["-c", ROOT / "constraints.txt", source]
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
    )
    if done.returncode and any(word in done.stderr for word in NO_NETWORK):
        pytest.skip(f"no package index in reach: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    probe = subprocess.run([python, "-c", PROBE], env=variables, capture_output=True, text=True, timeout=60, check=True)
    installed = set(json.loads(probe.stdout))
    assert installed == {
        "expertd",
        "googleapis-common-protos",
        "grpcio",
        "grpcio-health-checking",
        "ml-dtypes",
        "numpy",
        "protobuf",
        "typing-extensions",
    }
