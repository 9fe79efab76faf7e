"""A server process that is kept alive, and ends with the process that started it."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from expertd import AdminClient, ClientConfig, ExpertGroup, GroupConfig
from expertd.errors import UnavailableError
from expertd_server.cluster_server import ServerProcess, ServerStatus
from expertd_server.cluster_spec import write_topology
from expertd_server.tether import tethered

CERTS = Path(__file__).parent / "certs"
PATIENCE_S = 60.0


def wait_for(process: ServerProcess, condition: Callable[[ServerStatus], bool]) -> ServerStatus:
    until_s = time.monotonic() + PATIENCE_S
    while not condition(status := process.status()):
        assert time.monotonic() < until_s, status
        time.sleep(0.05)
    return status


def test_a_killed_server_comes_back_and_a_drained_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTD_PORT", "1")  # the flags alone count
    flags = ["--synthetic", "tiny", "--device", "cpu", "--expert-token-metrics", "--admin"]
    process = ServerProcess(flags, "127.0.0.1", shutdown_grace_s=30, start_timeout_s=PATIENCE_S)
    first = wait_for(process, lambda status: status.state == "serving")
    assert first.pid is not None
    assert first.admin_port, "the cluster's servers may share a host: each takes a free port"
    assert first.admin_port != 50052
    assert first.stats.tokens == 0
    assert set(first.stats.expert_tokens) == set(range(8))
    os.kill(first.pid, signal.SIGKILL)
    second = wait_for(process, lambda status: status.state == "serving" and status.num_starts == 2)
    assert second.exit_code == -signal.SIGKILL
    assert second.pid != first.pid
    assert second.instance_id != first.instance_id
    assert process.drain()
    assert process.status().state == "stopped"
    assert not psutil.pid_exists(second.pid or 0)


@pytest.mark.parametrize("frontends", [0, 1])
def test_a_server_at_an_ipv6_address_says_what_to_dial(tmp_path: Path, frontends: int) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"there is no ::1 here: {error}")
    flags = ["--synthetic", "tiny", "--device", "cpu", "--frontends", str(frontends)]
    process = ServerProcess(flags, "::1", shutdown_grace_s=30, start_timeout_s=PATIENCE_S)
    try:
        serving = wait_for(process, lambda status: status.state == "serving")
        assert serving.address is not None
        assert serving.metrics_address is not None
        assert serving.metrics_address.startswith("[::1]:")
        topology = tmp_path / "experts.json"
        write_topology(topology, [serving.address])
        with ExpertGroup(topology) as group:
            assert [layer.name for layer in group.layers(timeout_s=PATIENCE_S)] == ["synthetic.tiny.0"]
    finally:
        assert process.drain()


def test_of_a_server_with_tls_the_metrics_tell_how_it_is(tmp_path: Path) -> None:
    flags = ["--synthetic", "tiny", "--device", "cpu", "--admin"]
    flags += ["--tls-cert-file", str(CERTS / "server.pem"), "--tls-key-file", str(CERTS / "server.key")]
    trusted = functools.partial(ClientConfig, ca_file=CERTS / "authority.pem", server_name="localhost")
    process = ServerProcess(flags, "127.0.0.1", shutdown_grace_s=30, start_timeout_s=PATIENCE_S, is_tls=True)
    try:
        serving = wait_for(process, lambda status: status.state == "serving")
        assert serving.address is not None
        topology = tmp_path / "experts.json"
        write_topology(topology, [serving.address])
        with ExpertGroup(topology, GroupConfig(client=trusted)) as group:
            assert [layer.name for layer in group.layers(timeout_s=PATIENCE_S)] == ["synthetic.tiny.0"]
        with ExpertGroup(topology) as group, pytest.raises(UnavailableError):
            group.layers(timeout_s=PATIENCE_S)
        with AdminClient(trusted(f"127.0.0.1:{serving.admin_port}")) as admin:
            assert admin.drain(timeout_s=PATIENCE_S)
        drained = process.status()
        assert (drained.state, drained.pid) == ("unhealthy", serving.pid), "as it was told: it is left alone"
    finally:
        assert process.drain()


def test_a_server_that_cannot_start_says_why() -> None:
    process = ServerProcess(
        ["--synthetic", "tiny", "--experts", "9-12"], "127.0.0.1", shutdown_grace_s=1, start_timeout_s=PATIENCE_S
    )
    status = wait_for(process, lambda status: status.exit_code is not None)
    assert status.exit_code == 2
    assert "expertd-server: " in status.last_words
    process.drain()


def test_a_server_that_never_gets_ready_is_started_again() -> None:
    # Less than it takes Python to start: to this process, every server hangs.
    flags = ["--synthetic", "tiny", "--device", "cpu"]
    process = ServerProcess(flags, "127.0.0.1", shutdown_grace_s=1, start_timeout_s=0.01)
    try:
        status = wait_for(process, lambda status: status.num_starts >= 2)
        assert status.exit_code == -signal.SIGKILL
    finally:
        process.drain()


_PARENT = """
import subprocess, sys
from expertd_server.tether import tethered
child = subprocess.Popen(tethered([sys.executable, "-c", "import signal, sys; signal.sigwait([signal.SIGHUP])"]))
print(child.pid, flush=True)
child.wait()
"""


def test_a_tethered_process_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        wait_until_executed(child)
        parent.kill()
    psutil.wait_procs([child], timeout=PATIENCE_S)
    assert not child.is_running()


def wait_until_executed(child: psutil.Process) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while "sigwait" not in " ".join(child.cmdline()[:3]):
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_a_tethered_process_whose_parent_is_gone_does_not_start() -> None:
    command = tethered(["/bin/echo", "never"])
    command[3] = "1"  # some other process
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stdout) == (1, "")
