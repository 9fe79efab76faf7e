"""Other servers that a user would host an operator with, for bench_service.py --peer: how they are started, and what is
made of their figures.

Each runs in an environment of its own, named by its interpreter: nothing here is installed with expertd.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import psutil
from _requests import RequestShape
from _v2 import METHOD, Encoding, v2_message

from expertd_server.malloc import SETTINGS as MALLOC_SETTINGS

__all__ = ["Peer", "PeerMissingError", "compared", "facts_of", "peer_option", "running_peer", "terminated"]

_PROGRAMS: Final = Path(__file__).resolve().parent / "peers"
_ENCODINGS: Final[dict[str, tuple[Encoding, ...]]] = {
    "kserve": ("numbers",),  # its BYTES tensors are the slow ones
    "mlserver": ("bytes", "numbers"),
    "ray": ("numbers",),
}
_QUESTION: Final = """
import importlib.metadata as installed, json, platform
names = {names!r}
print(json.dumps({{"python": platform.python_version(), **{{name: installed.version(name) for name in names}}}}))
"""
_ASK_S: Final = 60.0
_TRY_S: Final = 2.0


class PeerMissingError(Exception):
    """A peer cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A server, and the interpreter of the environment that it is installed in."""

    name: str
    python: Path

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """How to send it tensors."""
        return _ENCODINGS[self.name]


def peer_option(text: str) -> Peer:
    """What stands behind --peer. Raises argparse.ArgumentTypeError."""
    name, _, python = text.partition("=")
    if name not in _ENCODINGS or not python:
        raise argparse.ArgumentTypeError(
            f"is {text!r}, expected NAME=PYTHON with a name of {', '.join(_ENCODINGS)} and the interpreter that it is "
            f"installed for"
        )
    return Peer(name, Path(python))


def facts_of(peer: Peer) -> dict[str, str]:
    """Versions of what runs it. Raises PeerMissingError."""
    question = _QUESTION.format(names=(peer.name, "grpcio", "protobuf"))
    try:
        done = subprocess.run([peer.python, "-c", question], capture_output=True, text=True, timeout=_ASK_S, check=True)
    except subprocess.CalledProcessError as error:
        raise PeerMissingError((error.stderr.strip().splitlines() or ["it does not say why"])[-1]) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerMissingError(f"{peer.python} cannot be run: {error}") from error
    facts: dict[str, str] = json.loads(done.stdout)
    return facts


@contextlib.contextmanager
def running_peer(peer: Peer, port: int, shape: RequestShape, start_timeout_s: float) -> Iterator[subprocess.Popen[str]]:
    """Its server on a port, with the malloc settings of expertd's launcher. Raises PeerMissingError."""
    command = [str(peer.python), str(_PROGRAMS / f"{peer.name}_server.py"), f"--port={port}"]
    command += [f"--tokens={shape.num_tokens}", f"--hidden-size={shape.hidden_size}"]
    environment = {**os.environ, **MALLOC_SETTINGS}
    with tempfile.TemporaryFile("w+") as said:  # not a pipe, which somebody would have to empty
        process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=said)
        with terminated(process):
            try:
                _wait_answers(process, port, v2_message(shape, peer.encodings[0]), start_timeout_s)
            except PeerMissingError as error:
                said.seek(0)
                last = next((line for line in reversed(said.read().split("\n")) if line.strip()), "nothing")
                raise PeerMissingError(f"{error}; it said last: {last}") from error
            yield process


@contextlib.contextmanager
def terminated(process: subprocess.Popen[str]) -> Iterator[psutil.Process]:
    """Stop a server at the end, and wait for it."""
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_answers(process: subprocess.Popen[str], port: int, message: bytes, timeout_s: float) -> None:
    until_s = time.monotonic() + timeout_s
    last = "nobody listens"
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.max_receive_message_length", -1)]) as channel:
        ask: Any = channel.unary_unary(METHOD, None, None)
        while time.monotonic() < until_s:
            if process.poll() is not None:
                raise PeerMissingError(f"its server ended with exit code {process.returncode}")
            try:
                ask(message, timeout=_TRY_S, wait_for_ready=True)
            except grpc.RpcError as error:
                last = f"{error.code().name}: {error.details()}"
                time.sleep(0.2)
            else:
                return
    raise PeerMissingError(f"it did not answer within {timeout_s:g} s: {last}")


def compared(figures: Mapping[str, tuple[float, float, float]], ours: str) -> dict[str, dict[str, float]]:
    """What to print of each server, by name.

    figures: p50 in microseconds with one request in flight; requests per second, and CPU microseconds of the server for
    each, when saturated. ours: the name that the others are compared with: how many times their latency and CPU time
    are its, and its throughput is theirs.
    """
    our_p50_us, our_rate, our_cpu_us = figures[ours]
    return {
        name: {
            "lone_p50_us": p50_us,
            "saturated_requests_per_s": rate,
            "cpu_us_per_request": cpu_us,
            "p50_over_ours": p50_us / our_p50_us,
            "ours_over_throughput": our_rate / rate,
            "cpu_over_ours": cpu_us / our_cpu_us,
        }
        for name, (p50_us, rate, cpu_us) in figures.items()
    }
