"""One client process of soak.py: does one kind of thing to a server until its standard input closes.

    python _soak_worker.py JOB.json

Prints a line of JSON, what came of its requests so far, four times a second. Kinds of outcome: "ok" (answered, and the
bits are the operator's), "wrong" (other bits), "cancelled" and "late" (given up, as it meant to), "refused" (a bad
request got the error it should get), anything else went wrong and has the error's name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np

import expertd
from expertd._rings import rings_end, wanted_rings
from expertd._shm import _shared
from expertd.v1 import expertd_pb2 as pb

__all__ = ["Case", "cases"]

SIZES = (1, 8, 32, 128, 512)
REPORT_S = 0.25
TIMEOUT_S = 60.0
REGION_BYTES = 1 << 20
NUM_SLOTS = 64
"""Of each ring."""
FORWARD, FORWARD_STREAM = "/expertd.v1.ExpertService/Forward", "/expertd.v1.ExpertService/ForwardStream"
_FP8, _BFLOAT16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


@dataclass(frozen=True)
class Case:
    """A request whose answer is known: T tokens, H hidden_size, E num_experts, K top_k."""

    name: str
    hidden_states: np.ndarray[Any, Any]
    """[T, H] float8_e4m3fn or bfloat16."""
    routing_logits: np.ndarray[Any, Any] | None
    """[T, E] float32; None: ids and weights."""
    topk_ids: np.ndarray[Any, Any] | None
    topk_weights: np.ndarray[Any, Any] | None
    output_dtype: str

    def arguments(self) -> dict[str, Any]:
        """Of expertd.Client.forward, but the layer."""
        routing = {"routing_logits": self.routing_logits}
        if self.routing_logits is None:
            routing = {"topk_ids": self.topk_ids, "topk_weights": self.topk_weights}
        return {"hidden_states": self.hidden_states, "output_dtype": self.output_dtype, **routing}


def cases(hidden_size: int, num_experts: int, top_k: int) -> list[Case]:
    """All sizes in every kind: both input types, routed by the server or the caller, both output types."""
    chance = np.random.default_rng(20261126)
    made = []
    for num_tokens in SIZES:
        for kind in range(4):
            hidden = chance.standard_normal((num_tokens, hidden_size), np.float32)
            logits = chance.standard_normal((num_tokens, num_experts), np.float32)
            ids = np.argsort(-logits, axis=1)[:, :top_k].astype(np.int32)
            weights = chance.random((num_tokens, top_k), np.float32)
            is_routed = kind >= 2
            made.append(
                Case(
                    f"{num_tokens}-{kind}",
                    hidden.astype(_FP8 if kind % 2 else _BFLOAT16),
                    None if is_routed else logits,
                    np.ascontiguousarray(ids) if is_routed else None,
                    weights if is_routed else None,
                    "float32" if kind == 1 else "bfloat16",
                )
            )
    return made


class Worker:
    """What a job needs: the server, cases with their answers, and a tally."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.target: str = job["target"]
        self.layer: str = job["layer"]
        self.transport = job["transport"]
        self.threads: int = job["threads"]
        self.seed: int = job["seed"]
        answers = np.load(job["answers"])
        self.cases = [(case, bytes(answers[case.name])) for case in cases(*job["shape"])]
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.is_over = threading.Event()

    def count(self, outcome: str) -> None:
        """Count an outcome."""
        with self._lock:
            self.outcomes[outcome] += 1

    def check(self, answer: Any, expected: bytes) -> None:
        """Count an answer by its bits."""
        self.count("ok" if answer.output.tobytes() == expected else "wrong")

    def config(self) -> expertd.ClientConfig:
        """Of the SDK's clients."""
        return expertd.ClientConfig(self.target, transport=self.transport, timeout_s=TIMEOUT_S)

    def report(self) -> None:
        """Print the tally."""
        with self._lock:
            print(json.dumps(self.outcomes), flush=True)


def steady(worker: Worker) -> None:
    """Threads that ask for everything in turn, one client for all. Every tenth keeps an answer for a while."""
    with expertd.Client(worker.config()) as client:

        def work(seed: int) -> None:
            chance = random.Random(seed)
            kept: list[tuple[Any, bytes]] = []
            while not worker.is_over.is_set():
                case, expected = chance.choice(worker.cases)
                try:
                    answer = client.forward(worker.layer, **case.arguments())
                except expertd.ExpertdError as error:
                    worker.count(type(error).__name__)
                    continue
                worker.check(answer, expected)
                if chance.random() < 0.1:
                    kept.append((answer, expected))
                if len(kept) > 20:
                    worker.check(*kept.pop(0))

        in_threads(worker, work)


def prepared(worker: Worker) -> None:
    """Threads that each have some prepared calls in flight, over and over; some of them allow too little time."""
    with expertd.Client(worker.config()) as client:

        def lent(array: Any) -> Any:
            copy = client.empty(array.shape, array.dtype)
            copy[...] = array
            return copy

        def prepare(case: Case, chance: random.Random) -> expertd.PreparedForward[Any]:
            arguments = case.arguments()
            if chance.random() < 0.8:  # else they are copied
                arrays = {name: lent(value) for name, value in arguments.items() if isinstance(value, np.ndarray)}
                arguments |= arrays
            timeout_s = chance.uniform(0.001, 0.03) if chance.random() < 0.1 else TIMEOUT_S
            out = client.empty(case.hidden_states.shape, case.output_dtype)
            request = expertd.ForwardRequest(layer=worker.layer, **arguments, out=out, timeout_s=timeout_s)
            return client.prepare(request)

        def work(seed: int) -> None:
            chance = random.Random(seed)
            while not worker.is_over.is_set():
                calls = [(prepare(case, chance), expected) for case, expected in chance.sample(worker.cases, 3)]
                for _ in range(10):
                    for call, _ in calls:
                        call.start()
                    for call, expected in calls:
                        try:
                            worker.check(call.wait(), expected)
                        except expertd.TimeoutError as error:
                            worker.count("late" if call.timeout_s < TIMEOUT_S else type(error).__name__)
                        except expertd.ExpertdError as error:
                            worker.count(type(error).__name__)

        in_threads(worker, work)


def impatient(worker: Worker) -> None:
    """Tasks that cancel, that allow too little time, and that do neither."""

    async def work(client: expertd.AsyncClient, seed: int) -> None:
        chance = random.Random(seed)
        while not worker.is_over.is_set():
            case, expected = chance.choice(worker.cases)
            what = chance.random()
            timeout_s = chance.uniform(0.001, 0.03) if what < 1 / 3 else TIMEOUT_S
            task = asyncio.create_task(client.forward(worker.layer, **case.arguments(), timeout_s=timeout_s))
            try:
                if what > 2 / 3:
                    await asyncio.wait([task], timeout=chance.uniform(0, 0.02))
                    task.cancel()
                worker.check(await task, expected)
            except asyncio.CancelledError:
                worker.count("cancelled")
            except expertd.TimeoutError as error:
                worker.count("late" if timeout_s < TIMEOUT_S else type(error).__name__)
            except expertd.ExpertdError as error:
                worker.count(type(error).__name__)

    async def run() -> None:
        async with expertd.AsyncClient(worker.config()) as client:
            await asyncio.gather(*(work(client, worker.seed * 100 + n) for n in range(worker.threads)))

    asyncio.run(run())


def malformed(worker: Worker) -> None:
    """Requests that are wrong in every way, as bytes and through memory; each must get its error, and nothing else."""
    chance = random.Random(worker.seed)
    while not worker.is_over.is_set():
        for misdeed in (wrong_fields, wrong_bytes, wrong_slices, wrong_rings):
            options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(worker.target, options=options) as channel:
                try:
                    misdeed(worker, channel, chance)
                except grpc.RpcError as error:
                    worker.count(f"{misdeed.__name__}: {error.code().name}")
        time.sleep(0.05)


def wrong_fields(worker: Worker, channel: grpc.Channel, chance: random.Random) -> None:
    """Unary calls with a field that does not fit."""
    call = channel.unary_unary(FORWARD, None, None)
    for change, code in (
        (lambda r: setattr(r, "layer", "nowhere"), grpc.StatusCode.NOT_FOUND),
        (lambda r: r.hidden_states.shape.append(1), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda r: setattr(r.hidden_states, "data", r.hidden_states.data[1:]), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda r: r.ClearField("routing_logits"), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda r: setattr(r, "weights_version", 99), grpc.StatusCode.FAILED_PRECONDITION),
    ):
        request = message_of(worker, chance)
        change(request)
        try:
            call(request.SerializeToString(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            worker.count("refused" if error.code() is code else f"wrong_fields: {error.code().name}")
        else:
            worker.count("wrong_fields: OK")


def wrong_bytes(worker: Worker, channel: grpc.Channel, chance: random.Random) -> None:
    """A stream of bytes that are no message ends with INVALID_ARGUMENT."""
    garbage = b"\xff" + chance.randbytes(chance.randrange(10_000))
    try:
        list(channel.stream_stream(FORWARD_STREAM, None, None)(iter([garbage]), timeout=TIMEOUT_S))
    except grpc.RpcError as error:
        is_right = error.code() is grpc.StatusCode.INVALID_ARGUMENT
        worker.count("refused" if is_right else f"wrong_bytes: {error.code().name}")
    else:
        worker.count("wrong_bytes: OK")


def wrong_slices(worker: Worker, channel: grpc.Channel, chance: random.Random) -> None:
    """Pieces of memory out of bounds, of no region, over one another; and memory that changes all the time."""
    to_send: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    answers: Any = channel.stream_stream(FORWARD_STREAM, None, None)(iter(to_send.get, None), timeout=TIMEOUT_S)

    def ask(number: int, **fields: Any) -> pb.ForwardStreamResponse:
        to_send.put(pb.ForwardStreamRequest(id=number, **fields).SerializeToString())
        return pb.ForwardStreamResponse.FromString(next(answers))

    granted = ask(1, register_region=pb.RegisterRegion(region=1, nbytes=REGION_BYTES))
    memory = _shared(granted.region_ticket, REGION_BYTES, NUM_SLOTS)[0].memory
    for number, (region, offset) in enumerate(
        ((1, REGION_BYTES), (1, 2**64 - 1), (7, 0), (1, REGION_BYTES - 1)), start=2
    ):
        request = message_of(worker, chance)
        where = pb.RegionSlice(region=region, offset=offset, nbytes=len(request.hidden_states.data))
        request.hidden_states.ClearField("data")
        request.hidden_states.slice.CopyFrom(where)
        answer = ask(number, request=request)
        is_right = answer.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        worker.count("refused" if is_right else f"wrong_slices: {answer.WhichOneof('result')}")
    # Whatever comes of these, the server must survive them: ids and logits that change while they are looked at.
    request = message_of(worker, chance)
    nbytes = len(request.routing_logits.data)
    request.routing_logits.ClearField("data")
    request.routing_logits.slice.CopyFrom(pb.RegionSlice(region=1, offset=64, nbytes=nbytes))
    request.answer_slice.CopyFrom(pb.RegionSlice(region=1, offset=64, nbytes=REGION_BYTES - 64))
    to_send.put(pb.ForwardStreamRequest(id=9, request=request).SerializeToString())
    for _ in range(50):
        memory[64:4096] = chance.randrange(256)
    next(answers)
    worker.count("refused")
    to_send.put(None)
    list(answers)


def wrong_rings(worker: Worker, channel: grpc.Channel, chance: random.Random) -> None:
    """Rings whose every byte may change at any time, their counts at last to what cannot be."""
    to_send: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    answers: Any = channel.stream_stream(FORWARD_STREAM, None, None)(iter(to_send.get, None), timeout=TIMEOUT_S)
    asked = pb.RegisterRegion(region=1, nbytes=REGION_BYTES, rings=wanted_rings(NUM_SLOTS))
    to_send.put(pb.ForwardStreamRequest(id=1, register_region=asked).SerializeToString())
    granted = pb.ForwardStreamResponse.FromString(next(answers))
    arena, rings = _shared(granted.region_ticket, REGION_BYTES, NUM_SLOTS)
    if rings is None:
        worker.count("wrong_rings: none")
        return
    good = pb.ForwardStreamRequest(id=2, request=pb.ForwardRequest(layer=worker.layer)).SerializeToString()
    for _ in range(chance.randrange(100)):
        rings.put(good if chance.random() < 0.9 else chance.randbytes(chance.randrange(1000)))
        at = chance.randrange(64, rings_end(NUM_SLOTS))
        arena.memory[at : at + 8] = chance.randrange(256)
    arena.memory[64:72] = 0xFF
    with contextlib.suppress(OSError):  # the stream may have ended already
        os.write(rings._requests.bell_fd, b"\0")
    try:
        list(answers)
    except grpc.RpcError as error:
        is_right = error.code() is grpc.StatusCode.INVALID_ARGUMENT
        worker.count("refused" if is_right else f"wrong_rings: {error.code().name}")
    rings.close()
    to_send.put(None)


def message_of(worker: Worker, chance: random.Random) -> pb.ForwardRequest:
    """A good request of 8 tokens with FP8 hidden states and logits, as bytes."""
    case = next(case for case, _ in worker.cases if case.name == "8-1")
    assert case.routing_logits is not None
    return pb.ForwardRequest(
        layer=worker.layer,
        hidden_states=pb.Tensor(
            dtype=pb.DATA_TYPE_FLOAT8_E4M3FN, shape=case.hidden_states.shape, data=case.hidden_states.tobytes()
        ),
        routing_logits=pb.Tensor(
            dtype=pb.DATA_TYPE_FLOAT32, shape=case.routing_logits.shape, data=case.routing_logits.tobytes()
        ),
        options=pb.ForwardOptions(return_routing=chance.random() < 0.5),
    )


def in_threads(worker: Worker, work: Callable[[int], None]) -> None:
    """Run as many as the job says, to the end."""
    threads = [threading.Thread(target=work, args=(worker.seed * 100 + n,)) for n in range(worker.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def lines(worker: Worker) -> Iterator[None]:
    """Report until standard input closes."""
    closed = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        closed.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    while not closed.wait(REPORT_S):
        worker.report()
        yield


def main() -> None:
    """Do what the job says."""
    job = json.loads(Path(sys.argv[1]).read_text())
    worker = Worker(job)
    kind = {"steady": steady, "prepared": prepared, "impatient": impatient, "malformed": malformed}[job["kind"]]
    thread = threading.Thread(target=kind, args=(worker,))
    thread.start()
    for _ in lines(worker):
        if not thread.is_alive():
            sys.exit("the work ended by itself")
    worker.is_over.set()
    thread.join(2 * TIMEOUT_S)
    worker.report()


if __name__ == "__main__":
    main()
