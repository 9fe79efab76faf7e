"""What the tests of the SDK share: both clients behind one face, requests, and the answers that are right."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import numpy as np
from fake_service import BFLOAT16, E, H, Hook, finalize, route
from serving import PATIENCE_S

import expertd
from expertd import ForwardRequest
from expertd.v1 import expertd_pb2 as pb


class Driver:
    """One of the two clients behind one synchronous face, so that a case is written once."""

    def __init__(self, flavour: str, config: expertd.ClientConfig) -> None:
        self._runner = asyncio.Runner() if flavour == "async" else None
        self.client: Any = expertd.AsyncClient(config) if self._runner else expertd.Client(config)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.run(method(*args, **kwargs))

        return call

    def run(self, value: Any) -> Any:
        return self._runner.run(value) if self._runner is not None and asyncio.iscoroutine(value) else value

    def prepare(self, layer: str, hidden_states: Any, **arguments: Any) -> Any:
        """Of the arguments of forward."""
        return self.run(self.client.prepare(ForwardRequest(layer=layer, hidden_states=hidden_states, **arguments)))

    def forward_many(self, requests: Iterable[ForwardRequest[Any]], **kwargs: Any) -> Iterator[Any]:
        results = self.client.forward_many(requests, **kwargs)
        if self._runner is None:
            yield from results
            return
        while (result := self._runner.run(_next(results))) is not StopAsyncIteration:
            yield result

    def shut(self) -> None:
        self.run(self.client.close())
        if self._runner is not None:
            self._runner.close()


@contextlib.contextmanager
def connected(flavour: str, port: int, transport: Any = "shm", **options: Any) -> Iterator[Driver]:
    """A client that is patient and tries nothing twice, unless the options say otherwise."""
    options = {"timeout_s": PATIENCE_S, "retry": expertd.RetryPolicy(max_attempts=1)} | options
    driver = Driver(flavour, expertd.ClientConfig(f"127.0.0.1:{port}", transport=transport, **options))
    try:
        yield driver
    finally:
        driver.shut()


async def _next(results: AsyncIterator[Any]) -> Any:
    return await anext(results, StopAsyncIteration)


FLAVOURS = [("sync", "stream"), ("sync", "unary"), ("async", "stream"), ("async", "unary")]


QUICK = expertd.RetryPolicy(max_attempts=6, initial_backoff_s=0.01, max_backoff_s=0.05)


Connect = Callable[..., Driver]


def is_stream(driver: Driver) -> bool:
    return bool(driver.client.config.transport == "stream")


def tokens(count: int, seed: int = 0, dtype: Any = BFLOAT16) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """hidden_states [count, H] and routing_logits [count, E]."""
    rng = np.random.default_rng(seed)
    return rng.integers(-8, 8, (count, H)).astype(dtype), rng.standard_normal((count, E)).astype(np.float32)


def expected_output(hidden: np.ndarray[Any, Any], logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(finalize(hidden, *route(logits)))


def requests_of(sizes: Iterable[int]) -> list[ForwardRequest[np.ndarray[Any, Any]]]:
    made = []
    for seed, size in enumerate(sizes):
        hidden, logits = tokens(size, seed)
        made.append(ForwardRequest(layer="a", hidden_states=hidden, routing_logits=logits, output_dtype="float32"))
    return made


def check_answers(requests: list[ForwardRequest[Any]], results: list[Any]) -> None:
    assert len(results) == len(requests)
    for index, (request, result) in enumerate(zip(requests, results, strict=True)):
        want = expected_output(request.hidden_states, np.asarray(request.routing_logits))
        assert np.array_equal(result.output, want), f"request {index}, {len(want)} tokens"


def fails_at_first(times: int, failure: Exception) -> Hook:
    lock = threading.Lock()
    failures = iter([failure] * times)

    def hook(request: pb.ForwardRequest) -> None:
        with lock:
            error = next(failures, None)
        if error is not None:
            raise error

    return hook


def wait(event: threading.Event) -> None:
    assert event.wait(20)
