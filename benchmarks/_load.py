"""One client process of bench_service.py: sends prepared requests, measures when each answer is there.

Closed loop: every stream (or unary thread) keeps `in_flight` requests open. Open loop: requests are due at random times
of a Poisson process, whatever the server does, and a latency counts from the time at which its request was due, so that
a server that stalls cannot hide it by slowing the clients down (coordinated omission).

Reads one JSON object on standard input: the job. Says "ready" when each of its streams has had a first answer, so that
no clock runs while connections are opened, which takes a second where the machine is busy. Then reads another: when to
begin and to end. Writes an array of (due, done) times to a file, monotonic seconds, and a JSON object of errors to
standard output.
"""

from __future__ import annotations

import itertools
import json
import queue
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from _requests import RequestShape, stream_message, unary_message
from _v2 import METHOD as V2_METHOD
from _v2 import v2_message

if TYPE_CHECKING:
    from expertd import PreparedForward

_PATIENCE_S = 30.0
_LONGEST_S = 3600.0
_IN_PLACE, _PREPARED = "-inplace", "-prepared"
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a connection for each stream: SO_REUSEPORT spreads connections
]


@dataclass
class Job:
    """What this process does."""

    target: str
    method: str
    """Full method name, "/package.Service/Method"."""
    transport: str
    """stream, unary, or sdk: expertd.Client with each of its transports as "sdk-stream", ..., as "sdk-shm-inplace" with
    arrays that lie in shared memory, and as "sdk-shm-prepared" with prepared calls on such arrays; v2-numbers and
    v2-bytes: unary, in the V2 inference protocol, see _v2."""
    layers: list[str]
    shape: dict[str, Any]
    """Fields of RequestShape."""
    streams: int
    in_flight: int
    rate: float | None
    """Requests due per second, over all streams of this process; None: closed loop."""
    warmup_s: float
    seed: int
    result_file: str
    begin_s: float = 0.0
    """The first requests are due warmup_s before."""
    end_s: float = 0.0
    """No request is due from then on."""


@dataclass
class Record:
    """Times of answered requests, and what went wrong."""

    times: list[tuple[float, float]] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)

    def fail(self, what: str) -> None:
        """Count a failure."""
        self.errors[what] = self.errors.get(what, 0) + 1


class Gate:
    """Where the streams of this process wait, each with a first answer, until the clock is told. Thread-safe."""

    def __init__(self) -> None:
        self._arrived = threading.Semaphore(0)
        self._is_open = threading.Event()

    def arrive(self) -> None:
        """Say that a stream has had its first answer, or will never have one."""
        self._arrived.release()

    def wait(self) -> None:
        """Wait for `open`."""
        if not self._is_open.wait(_LONGEST_S):
            raise TimeoutError("the clock was never told")

    def wait_arrived(self, count: int) -> None:
        """Wait until so many streams have arrived."""
        for _ in range(count):
            if not self._arrived.acquire(timeout=_PATIENCE_S):
                raise TimeoutError(f"a stream had no first answer within {_PATIENCE_S} s")

    def open(self) -> None:
        """The clock is told."""
        self._is_open.set()


def layers_of(job: Job, index: int) -> list[str]:
    """For each place of a stream a layer, by chance; it keeps that, as its message or call is made once."""
    return stream_chance(job, index).choices(job.layers, k=job.in_flight)


def stream_seeds(job: Job, index: int) -> Iterator[int]:
    """What the tensors of a stream's places are drawn from: none is like another, of whatever client."""
    return itertools.count((job.seed * 1009 + index) * 1009)


def stream_chance(job: Job, index: int) -> random.Random:
    """Chance for one stream, the same in every run."""
    return random.Random(job.seed * 1009 + index)


def due_times(job: Job, index: int) -> Iterator[float]:
    """When the requests of one stream are due: a Poisson process in the open loop, now in the closed one."""
    chance = stream_chance(job, index)
    due_s = job.begin_s - job.warmup_s
    while True:
        if job.rate is None:
            due_s = time.monotonic()
        else:
            due_s += chance.expovariate(job.rate / job.streams)
        if due_s >= job.end_s:
            return
        yield due_s


def sleep_until(due_s: float) -> None:
    """Return when it is due; at once where that has passed."""
    delay_s = due_s - time.monotonic()
    if delay_s > 0:
        time.sleep(delay_s)


def run_stream(job: Job, index: int, record: Record, gate: Gate) -> None:
    """One channel, one ForwardStream, `in_flight` requests at most."""
    shape = RequestShape(**job.shape)
    # A message for each place, made once: the ids tell the answers apart, and sending copies nothing here.
    places = zip(layers_of(job, index), stream_seeds(job, index), strict=False)
    messages = {n: stream_message(n, layer, shape, seed) for n, (layer, seed) in enumerate(places, 1)}
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for n in messages:
        free.put(n)
    due: dict[int, float] = {}
    order: deque[int] = deque()
    is_echo = "Echo" in job.method

    def requests() -> Iterator[bytes]:
        order.append(free.get())
        yield messages[order[0]]
        gate.wait()
        if job.rate is None:
            while True:
                n = free.get(timeout=_PATIENCE_S)
                due[n] = time.monotonic()
                if due[n] >= job.end_s:
                    return
                order.append(n)
                yield messages[n]
        for due_s in due_times(job, index):
            sleep_until(due_s)
            n = free.get(timeout=_PATIENCE_S)
            due[n] = due_s
            order.append(n)
            yield messages[n]

    with grpc.insecure_channel(job.target, options=[*_OPTIONS, ("bench.index", index)]) as channel:
        for answer in channel.stream_stream(job.method, None, None)(requests(), timeout=_LONGEST_S):
            done_s = time.monotonic()
            # The echo answers in order and names nobody; expertd says whose answer it is.
            n = order.popleft() if is_echo else stream_id(answer)
            if not (is_echo or is_answer(answer)):
                record.fail(error_of(answer))
            elif n in due:
                record.times.append((due[n], done_s))
            if not due:  # the first one
                gate.arrive()
            free.put(n)


def run_unary(job: Job, index: int, record: Record, gate: Gate) -> None:
    """One channel, one thread for each place in flight."""
    shape = RequestShape(**job.shape)
    method = job.method
    if job.transport == "unary":
        message = unary_message(layers_of(job, index)[0], shape, next(stream_seeds(job, index)))
    else:
        method = V2_METHOD
        message = v2_message(shape, "bytes" if job.transport == "v2-bytes" else "numbers")
    with grpc.insecure_channel(job.target, options=[*_OPTIONS, ("bench.index", index)]) as channel:
        call = channel.unary_unary(method, None, None)

        def ask() -> None:
            try:
                answer = call(message, timeout=_PATIENCE_S)
            except grpc.RpcError as error:
                raise FailedError(error.code().name) from error
            if len(answer) < shape.answer_bytes:
                raise FailedError(f"an answer of {len(answer)} bytes")

        ask_in_threads(job, index, record, gate, [ask] * job.in_flight)


def run_sdk(job: Job, index: int, record: Record, gate: Gate) -> None:
    """expertd.Client, one thread for each place in flight; prepared calls need one for all, in the open loop two."""
    import expertd  # noqa: PLC0415 (the raw clients do not need it)

    shape = RequestShape(**job.shape)
    transport: Any = job.transport.removeprefix("sdk-").removesuffix(_IN_PLACE).removesuffix(_PREPARED)
    config = expertd.ClientConfig(job.target, transport=transport, max_in_flight=max(32, job.in_flight))
    with expertd.Client(config) as client:
        seeds = stream_seeds(job, index)

        def arguments() -> dict[str, Any]:
            """Of one place in flight."""
            arrays = shape.arrays(next(seeds))
            if not job.transport.endswith((_IN_PLACE, _PREPARED)):
                return arrays
            copies = {name: client.empty(array.shape, array.dtype) for name, array in arrays.items()}
            for name, copy in copies.items():
                copy[...] = arrays[name]
            return copies | {"out": client.empty((shape.num_tokens, shape.hidden_size), "bfloat16")}

        def ask(forward: Callable[[], object]) -> None:
            try:
                forward()
            except expertd.ExpertdError as error:
                raise FailedError(type(error).__name__) from error

        layers = layers_of(job, index)
        if not job.transport.endswith(_PREPARED):
            forwards = [partial(client.forward, layer, **arguments()) for layer in layers]
            ask_in_threads(job, index, record, gate, [partial(ask, forward) for forward in forwards])
            return
        calls = [client.prepare(expertd.ForwardRequest(layer=layer, **arguments())) for layer in layers]
        steps = [Steps(call, partial(ask, call.wait)) for call in calls]
        if job.rate is None:
            ask_in_turn(job, record, gate, steps)
        else:
            ask_when_due(job, index, record, gate, steps)


@dataclass(frozen=True)
class Steps:
    """A prepared call that is made in steps. wait: in place of its own; raises FailedError."""

    call: PreparedForward[Any]
    wait: Callable[[], None]


class FailedError(Exception):
    """A request failed; the message says how, in a word or two."""


def ask_in_threads(job: Job, index: int, record: Record, gate: Gate, asks: list[Callable[[], None]]) -> None:
    """Do each of these over and over, in a thread of its own, when the first of them was answered once. In the open
    loop whoever is free does what is due next."""
    due, turn = due_times(job, index), threading.Lock()

    def next_due() -> float | None:
        with turn:
            return next(due, None)

    def repeat(ask: Callable[[], None]) -> None:
        while (due_s := next_due()) is not None:
            sleep_until(due_s)
            try:
                ask()
            except FailedError as error:
                record.fail(str(error))
            else:
                record.times.append((due_s, time.monotonic()))

    try:
        asks[0]()
    except FailedError as error:
        record.fail(str(error))
    gate.arrive()
    gate.wait()
    run_threads([threading.Thread(target=repeat, args=(ask,)) for ask in asks])


def ask_in_turn(job: Job, record: Record, gate: Gate, calls: list[Steps]) -> None:
    """Start all of these, wait for each and start it again, in this thread, when each was answered once. Of several
    layers some answer before others that were asked sooner: these start again, too, whenever one was waited for."""
    answer_each_once(record, gate, calls)
    due_s: dict[int, float] = {}
    """By number of the call, in the order in which they were started."""

    def begin(number: int) -> None:
        due_s[number] = time.monotonic()
        calls[number].call.start()

    def end(number: int) -> None:
        note(record, calls[number], due_s.pop(number))

    for number in range(len(calls)):
        begin(number)
    while due_s:
        answered = [next(iter(due_s))]
        end(answered[0])
        if len(job.layers) > 1:
            others = [number for number in due_s if calls[number].call.is_answered]
            for number in others:
                end(number)
            answered += others
        if time.monotonic() < job.end_s:
            for number in answered:
                begin(number)


def ask_when_due(job: Job, index: int, record: Record, gate: Gate, calls: list[Steps]) -> None:
    """Start whichever of these is free when a request is due, when each was answered once; where none is, the request
    waits, which counts. Another thread waits for them in the order in which they were started, which is that of the
    answers as long as one layer is asked for."""
    answer_each_once(record, gate, calls)
    # The one that was used last first: its memory is in caches, and no more is used than there is in flight.
    free: queue.LifoQueue[Steps] = queue.LifoQueue()
    for steps in calls:
        free.put(steps)
    started: queue.SimpleQueue[tuple[Steps, float] | None] = queue.SimpleQueue()

    def wait_for_all() -> None:
        while (one := started.get()) is not None:
            note(record, *one)
            free.put(one[0])

    waiter = threading.Thread(target=wait_for_all)
    waiter.start()
    try:
        for due_s in due_times(job, index):
            sleep_until(due_s)
            steps = free.get(timeout=_PATIENCE_S)
            steps.call.start()
            started.put((steps, due_s))
    finally:
        started.put(None)
        waiter.join()


def answer_each_once(record: Record, gate: Gate, calls: list[Steps]) -> None:
    """Before the clock is told: the server maps and pins memory when it is first used."""
    for steps in calls:
        steps.call.start()
        note(record, steps, None)
    gate.arrive()
    gate.wait()


def note(record: Record, steps: Steps, due_s: float | None) -> None:
    """Wait for an answer and note when it is there; due_s: None where it does not count."""
    try:
        steps.wait()
    except FailedError as error:
        record.fail(str(error))
    else:
        if due_s is not None:
            record.times.append((due_s, time.monotonic()))


def stream_id(answer: bytes) -> int:
    """ForwardStreamResponse.id, which expertd writes first."""
    value = shift = 0
    for byte in answer[1:11]:
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
        shift += 7
    raise ValueError("not a varint")


def is_answer(answer: bytes) -> bool:
    """Whether a ForwardStreamResponse holds a response (field 2): its key follows the id, which is below 128 here."""
    return answer[2] == 0x12


def error_of(answer: bytes) -> str:
    """The code of a ForwardStreamResponse that holds an error."""
    from expertd.v1 import expertd_pb2 as pb  # noqa: PLC0415

    error = pb.ForwardStreamResponse.FromString(answer).error
    return next(code.name for code in grpc.StatusCode if code.value[0] == error.code)


def run_one(job: Job, index: int, record: Record, gate: Gate) -> None:
    """One stream; what ends it early is told with the errors."""
    runs = {"stream": run_stream, "unary": run_unary, "v2-numbers": run_unary, "v2-bytes": run_unary}
    try:
        runs.get(job.transport, run_sdk)(job, index, record, gate)
    except grpc.RpcError as error:
        record.fail(f"the stream ended: {error.code().name}")
    except Exception as error:
        record.fail(f"the client failed: {error!r}")
    finally:
        gate.arrive()  # of no effect if it has


def run_threads(threads: list[threading.Thread]) -> None:
    """Start them all, wait for them all."""
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    """Run the job of standard input."""
    job = Job(**json.loads(sys.stdin.readline()))
    if job.transport.startswith("sdk"):
        import expertd  # noqa: F401, PLC0415 (takes a while: before the clock runs)
    records, gate = [Record() for _ in range(job.streams)], Gate()
    threads = [threading.Thread(target=run_one, args=(job, n, records[n], gate)) for n in range(job.streams)]
    for thread in threads:
        thread.start()
    gate.wait_arrived(job.streams)
    print("ready", flush=True)
    when = json.loads(sys.stdin.readline())
    job.begin_s, job.end_s = when["begin_s"], when["end_s"]
    time.sleep(max(0.0, job.begin_s - job.warmup_s - time.monotonic()))
    gate.open()
    for thread in threads:
        thread.join()
    times = [pair for record in records for pair in record.times]
    np.save(job.result_file, np.array(times, np.float64).reshape(-1, 2))
    errors: dict[str, int] = {}
    for record in records:
        for what, count in record.errors.items():
            errors[what] = errors.get(what, 0) + count
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
