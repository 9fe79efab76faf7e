"""What a front-end and the engine's process each do for one request besides gRPC: CPU time of both, over and over.

    PYTHONPATH=server:client python benchmarks/bench_frontends.py

A front-end in this process, the engine in another, shared memory between, the no-op backend. Streams whose messages
come at once and whose answers are taken at once stand in place of gRPC. CPU microseconds for each request, of the
front-end's event loop and of all the engine's threads, the least of some rounds; requests per second of the best round.
--profile: the front-end by function; --profile-engine: the engine's gate. They make everything slower.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from _requests import RequestShape, stream_message
from bench_request import Context

from expertd_server.malloc import reexec_with_settings

PRESET, HIDDEN_SIZE, NUM_EXPERTS = "qwen3-30b-a3b", 2048, 128
START_S = 60.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--in-flight", type=int, default=4, help="requests in flight on each stream")
    parser.add_argument("--count", type=int, default=500, help="requests of each stream in a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--profile-engine", action="store_true")
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    reexec_with_settings()
    if options.engine is not None:
        run_engine(options)
        return
    inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, f"--engine={outlet.fileno()}"]
    command += ["--profile-engine"] if options.profile_engine else []
    engine = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[outlet.fileno()])
    try:
        run_frontend(options, inlet, engine.pid)
    finally:
        assert engine.stdin is not None
        engine.stdin.close()
        engine.wait(START_S)


def run_engine(options: argparse.Namespace) -> None:
    """The engine's process, until its standard input ends."""
    from expertd_server.backend_noop import NoopBackend  # noqa: PLC0415 (torch: not in the front-end)
    from expertd_server.config import Config  # noqa: PLC0415
    from expertd_server.engine_process import EngineProcess  # noqa: PLC0415
    from expertd_server.layer import MoELayer  # noqa: PLC0415
    from expertd_server.synthetic import synthetic_layers  # noqa: PLC0415

    backend = NoopBackend()
    layers = [
        MoELayer(name, backend.prepare(spec, weights), backend)
        for name, spec, weights in synthetic_layers(PRESET, 1, local_num_experts=1)
    ]
    engine = EngineProcess(
        Config(synthetic=PRESET), socket.socket(fileno=options.engine), backend=backend, layers=layers
    )
    profile: Any = cProfile.Profile() if options.profile_engine else SimpleNamespace(enable=int, disable=int)
    engine.gate.soon(profile.enable)
    assert engine.startup(lambda: False)
    sys.stdin.read()
    engine.shutdown()
    if options.profile_engine:
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)


def run_frontend(options: argparse.Namespace, mailbox: socket.socket, engine_pid: int) -> None:
    """The table."""
    from expertd_server.config import Config  # noqa: PLC0415
    from expertd_server.frontend import Frontend  # noqa: PLC0415
    from expertd_server.regions import StreamRegions  # noqa: PLC0415
    from expertd_server.stream import Stream  # noqa: PLC0415

    frontend = Frontend(Config(synthetic=PRESET), "frontend-0", mailbox, "benchmark")
    frontend.start(0)
    until_s = time.monotonic() + START_S
    while frontend.store.is_loading:
        assert time.monotonic() < until_s, "the engine did not start"
        time.sleep(0.01)
    service = frontend._listener.service

    async def run(num_tokens: int) -> tuple[float, float, float]:
        message = stream_message(1, f"synthetic.{PRESET}.0", RequestShape(num_tokens, HIDDEN_SIZE, NUM_EXPERTS))
        streams: list[Stream] = []
        for _ in range(options.streams):
            context: Any = Context(message, options.in_flight, options.count)
            bounds: Any = {"regions": StreamRegions(None, 0), "max_requests": 256, "max_tokens": 2**20}
            bounds |= {"max_answer_bytes": 2**30}
            streams.append(Stream(service._calls, context, service._inbox, **bounds, log_id="-"))
        profile: Any = cProfile.Profile() if options.profile else SimpleNamespace(enable=int, disable=int)
        engine_s, thread_s, wall_s = cpu_s(engine_pid), time.thread_time(), time.perf_counter()
        profile.enable()
        await asyncio.gather(*(stream.run() for stream in streams))
        profile.disable()
        taken = time.thread_time() - thread_s, cpu_s(engine_pid) - engine_s, time.perf_counter() - wall_s
        if options.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
        return taken

    print(f"CPU µs for each request, {options.streams} streams with {options.in_flight} in flight")
    count = options.streams * options.count
    for num_tokens in options.tokens:
        rounds = [frontend._loop.run(run(num_tokens), 300) for _ in range(options.rounds)]
        mine, theirs, wall = (min(column) / count for column in zip(*rounds, strict=True))
        each = f"front-end {mine * 1e6:6.1f}, engine {theirs * 1e6:6.1f}"
        print(f"{num_tokens:5d} tokens: {each}, {1 / wall:7.0f} requests/s")
    frontend.shutdown()


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads that a process has, to the nanosecond."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


if __name__ == "__main__":
    main()
