"""The synchronous client."""

from __future__ import annotations

import functools
import heapq
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from expertd._arena import Bytes
from expertd._base import (
    CLOSED_IN_FLIGHT,
    GET_LAYER,
    GET_SERVER_INFO,
    HEALTH_CHECK,
    LIST_LAYERS,
    READY_POLL_S,
    BaseClient,
    Outcome,
    channel_credentials,
    channel_options,
    health_service,
    layer_info,
)
from expertd._plan import Part, Plan, PreparedRequest, prepare
from expertd._retry import Retries
from expertd._transport import Slots, StreamTransport, Ticket, Transport, UnaryTransport
from expertd.config import ClientConfig
from expertd.errors import (
    ClosedError,
    ExpertdError,
    InvalidRequestError,
    LayerNotFoundError,
    TimeoutError,
    UnavailableError,
    error_from_rpc,
)
from expertd.tensors import NewArray
from expertd.types import Array, ArrayT, ForwardRequest, ForwardResult, LayerInfo, ServerInfo
from expertd.v1 import expertd_pb2 as pb

__all__ = ["Client"]

MessageT = TypeVar("MessageT", bound=Message)
ResultT = TypeVar("ResultT")


class Client(BaseClient):
    """A connection to an expertd server. Thread-safe: one client serves any number of threads.

        with expertd.Client("localhost:50051") as client:
            result = client.forward("model.layers.0", hidden_states, routing_logits=router_logits)

    Opens its connections when they are first needed. Close it, or use it as a context manager.
    """

    def __init__(self, config: ClientConfig | str) -> None:
        """config: a ClientConfig, or a target such as "localhost:50051" with every option at its default.

        Raises ConfigError naming the option that cannot be used.
        """
        super().__init__(config)
        credentials = channel_credentials(self.config)
        self._channels = [
            grpc.insecure_channel(self.config.target, channel_options(self.config, index))
            if credentials is None
            else grpc.secure_channel(self.config.target, credentials, channel_options(self.config, index))
            for index in range(self.config.num_channels)
        ]
        self._slots = Slots(self.config.max_in_flight)
        self._transport: Transport = (
            UnaryTransport(self._channels, self._slots, self._metadata)
            if self.config.transport == "unary"
            else StreamTransport(self._channels, self._slots, self._metadata, self._unwanted, self._wanted_memory)
        )
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._pipelines: set[_Pipeline] = set()

    def forward(
        self,
        layer: str,
        hidden_states: ArrayT,
        *,
        routing_logits: Array | None = None,
        topk_ids: Array | None = None,
        topk_weights: Array | None = None,
        output_dtype: Any = None,
        do_finalize: bool = True,
        return_routing: bool = False,
        weights_version: int | None = None,
        timeout_s: float | None = None,
        out: ArrayT | None = None,
    ) -> ForwardResult[ArrayT]:
        """Run one layer on the caller's tokens. The arguments are the fields of ForwardRequest.

        Takes either routing_logits or topk_ids with topk_weights. More tokens than the server takes at once are sent in
        parts and joined. Raises ExpertdError: see `expertd.errors`.
        """
        request = ForwardRequest(
            layer=layer,
            hidden_states=hidden_states,
            routing_logits=routing_logits,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            output_dtype=output_dtype,
            do_finalize=do_finalize,
            return_routing=return_routing,
            weights_version=weights_version,
            timeout_s=timeout_s,
            out=out,
        )
        with _Pipeline(self, reads=True) as pipeline:
            return pipeline.wait(pipeline.start(request))

    @overload
    def forward_many(
        self, requests: Iterable[ForwardRequest[ArrayT]], *, return_exceptions: Literal[False] = False
    ) -> Iterator[ForwardResult[ArrayT]]: ...
    @overload
    def forward_many(
        self, requests: Iterable[ForwardRequest[ArrayT]], *, return_exceptions: bool
    ) -> Iterator[ForwardResult[ArrayT] | ExpertdError]: ...
    def forward_many(
        self, requests: Iterable[ForwardRequest[ArrayT]], *, return_exceptions: bool = False
    ) -> Iterator[ForwardResult[ArrayT] | ExpertdError]:
        """Run many requests, several on the wire at a time, and yield their results in the order of the requests.

        At most max_in_flight requests are ahead of the result that is read next: a slow reader slows the sending down.
        A failure is raised in its place and ends the iteration; with return_exceptions it is yielded instead.
        """
        with _Pipeline(self) as pipeline:
            ahead: deque[_Operation] = deque()
            remaining = iter(requests)
            while True:
                for request in itertools.islice(remaining, self.config.max_in_flight - len(ahead)):
                    ahead.append(pipeline.start(request))
                if not ahead:
                    return
                try:
                    result: ForwardResult[ArrayT] | ExpertdError = pipeline.wait(ahead.popleft())
                except ExpertdError as error:
                    if not return_exceptions:
                        raise
                    result = error.with_traceback(None)  # which knows this frame: leave no cycle
                yield result

    def empty(self, shape: int | Sequence[int], dtype: Any, *, timeout_s: float | None = None) -> Any:
        """An array, not initialised, in the memory that is shared with the server, where that has some.

        What lies there as a whole is not copied on its way to the server, nor is the output on its way to `out`. The
        memory is reserved as long as the array or a view of it is there. Where none is shared, or half of it is taken,
        this is an ordinary array, which serves as well; so does one whose stream has ended since.

        shape: as numpy takes it. dtype: one that goes on the wire, as a name ("bfloat16") or a numpy dtype for a numpy
        array, as a torch dtype for a tensor on the host. Connects if need be. Raises ExpertdError: see
        `expertd.errors`.
        """
        array = NewArray(shape, dtype)
        return array.on(self._lend(array.nbytes, self._deadline(timeout_s)))

    def layers(self, *, timeout_s: float | None = None) -> list[LayerInfo]:
        """Every layer that the server holds, sorted by name."""
        response = self._call(LIST_LAYERS, pb.ListLayersRequest(), pb.ListLayersResponse, self._deadline(timeout_s))
        return [layer_info(message) for message in response.layers]

    def layer(self, name: str, *, timeout_s: float | None = None) -> LayerInfo:
        """One layer by name. Raises LayerNotFoundError when the server does not hold it."""
        return self._fetch_layer(name, self._deadline(timeout_s))

    def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """What the server is, what it runs on and what it accepts."""
        return self._fetch_server(self._deadline(timeout_s))

    def wait_ready(self, layer: str | None = None, *, timeout_s: float | None = None) -> None:
        """Return when the server, or one layer of it, answers requests. Raises TimeoutError when it is late."""
        timeout_s = self._timeout_s(timeout_s)
        deadline = time.monotonic() + timeout_s
        what = "the server" if layer is None else f"layer {layer!r}"
        last = "no answer"
        while True:
            try:
                status = self._health(health_service(layer), deadline)
                if status == health_pb2.HealthCheckResponse.SERVING:
                    return
                last = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
            except (UnavailableError, LayerNotFoundError) as error:
                last = str(error)
            except TimeoutError:
                pass  # the deadline check below says what was seen last
            if time.monotonic() + READY_POLL_S >= deadline:
                raise TimeoutError(f"{what} was not ready within {timeout_s:g} s; last seen: {last}")
            if self._closed.wait(READY_POLL_S):
                raise ClosedError("the client was closed")

    def close(self) -> None:
        """Fail what is in flight with ClosedError, stop the client's threads and close its connections."""
        self._closed.set()
        self._slots.close()
        with self._lock:
            pipelines = list(self._pipelines)
        for pipeline in pipelines:
            pipeline.wake()
        self._transport.close()
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + self._timeout_s(timeout_s)

    def _make_plan(self, request: PreparedRequest, deadline: float) -> Plan:
        server = self._known_server or self._fetch_server(deadline)
        layer = self._known_layers.get(request.layer)
        try:
            if layer is not None:
                request.check_layer(layer)
        except InvalidRequestError:
            layer = None  # what was known may be old: ask before turning the caller away
        if layer is None:
            layer = self._fetch_layer(request.layer, deadline)
            request.check_layer(layer)
        return self._plan(request, server, layer)

    def _fetch_server(self, deadline: float) -> ServerInfo:
        return self._learn_server(
            self._call(GET_SERVER_INFO, pb.GetServerInfoRequest(), pb.GetServerInfoResponse, deadline)
        )

    def _fetch_layer(self, name: str, deadline: float) -> LayerInfo:
        return self._learn_layer(
            self._call(GET_LAYER, pb.GetLayerRequest(layer=name), pb.GetLayerResponse, deadline).layer
        )

    def _lend(self, nbytes: int, deadline: float) -> Bytes | None:
        """Memory for `empty`; None: there is none to share, or none to spare."""
        if self._wanted_memory is None:
            return None
        if self._known_server is None:
            self._fetch_server(deadline)
        return self._retried(deadline, lambda: self._transport.lend(nbytes, deadline))

    def _call(self, method: str, request: Message, response: type[MessageT], deadline: float) -> MessageT:
        """A small unary call, retried."""
        return self._retried(deadline, lambda: self._call_once(method, request, response, deadline))

    def _retried(self, deadline: float, once: Callable[[], ResultT]) -> ResultT:
        """What `once` returns, called again while its errors leave hope."""
        retries = self._retries(deadline)
        while True:
            try:
                return once()
            except ExpertdError as error:
                self._forget(error)
                delay = retries.delay_s(error, time.monotonic())
                if delay is None:
                    raise
            if self._closed.wait(delay):
                raise ClosedError("the client was closed")

    def _call_once(
        self, method: str, request: Message, response: type[MessageT], deadline: float, *, wait_for_ready: bool = False
    ) -> MessageT:
        if self._closed.is_set():
            raise ClosedError("the client is closed")
        metadata, request_id = self._metadata()
        call: Any = self._channels[0].unary_unary(
            method, request_serializer=type(request).SerializeToString, response_deserializer=response.FromString
        )
        try:
            timeout_s = deadline - time.monotonic()
            answer: MessageT = call(request, timeout=timeout_s, metadata=metadata, wait_for_ready=wait_for_ready)
            return answer
        except grpc.RpcError as error:
            if self._closed.is_set():
                raise ClosedError("the client was closed") from error
            raise error_from_rpc(error, request_id=request_id) from error
        except ValueError as error:  # what gRPC raises for a channel that another thread has just closed
            raise ClosedError("the client was closed") from error

    def _health(self, service: str, deadline: float) -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        response = self._call_once(HEALTH_CHECK, request, health_pb2.HealthCheckResponse, deadline, wait_for_ready=True)
        return int(response.status)


class _Run:
    """One part of an operation, on its way."""

    __slots__ = ("index", "operation", "part", "retries", "ticket")

    def __init__(self, operation: _Operation, index: int, part: Part, retries: Retries) -> None:
        self.operation = operation
        self.index = index
        self.part = part
        self.retries = retries
        self.ticket: Ticket | None = None


class _Operation:
    """One forward."""

    __slots__ = ("deadline", "error", "plan", "runs", "timeout_s")

    def __init__(self, deadline: float, timeout_s: float) -> None:
        self.deadline = deadline
        self.timeout_s = timeout_s
        self.plan: Plan | None = None
        self.runs: set[_Run] = set()
        """Parts without an answer."""
        self.error: ExpertdError | None = None

    def fail(self, error: ExpertdError) -> None:
        """Settle with an error; what is on the wire is abandoned."""
        # NOTE: a traceback knows the frames that know the operation, which knows the error: leave no cycle, it would
        # keep the caller's arrays. The caller sees the error from where `wait` raises it.
        self.error = error.with_traceback(None)
        for run in self.runs:
            if run.ticket is not None:
                run.ticket.abandon()
        self.runs.clear()


class _Pipeline:
    """The operations of one caller. Used by the caller's thread alone, but for the queue that answers come in by."""

    def __init__(self, client: Client, *, reads: bool = False) -> None:
        """reads: whether the caller waits for each operation as soon as it is started."""
        self._client = client
        self._reads = reads
        self._settled: queue.SimpleQueue[tuple[_Run, Outcome] | None] = queue.SimpleQueue()
        self._operations: set[_Operation] = set()
        self._waiting: list[tuple[float, int, _Run]] = []
        """Heap of (when to try again, tie breaker, what)."""
        self._tie = itertools.count()

    def __enter__(self) -> _Pipeline:
        with self._client._lock:
            self._client._pipelines.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        with self._client._lock:
            self._client._pipelines.discard(self)
        for operation in self._operations:
            operation.fail(ClosedError("the caller left"))

    def wake(self) -> None:
        """Make the caller's thread look again, because the client was closed. From any thread."""
        self._settled.put(None)

    def _arrived(self, run: _Run, outcome: Outcome) -> None:
        self._settled.put((run, outcome))

    def start(self, request: ForwardRequest[Any]) -> _Operation:
        """Check, split and send a request. Its own failures show when it is waited for."""
        client = self._client
        now = time.monotonic()
        operation = _Operation(now, 0.0)
        self._operations.add(operation)
        try:
            operation.timeout_s = client._timeout_s(request.timeout_s)
            operation.deadline = now + operation.timeout_s
            operation.plan = client._make_plan(prepare(request), operation.deadline)
        except ExpertdError as error:
            operation.fail(error)
        else:
            self._send_unanswered(operation)
        return operation

    def wait(self, operation: _Operation) -> ForwardResult[Any]:
        """The result of an operation. Raises its error. Meanwhile the others go on."""
        try:
            while operation.runs:
                self._step(operation)
            if operation.error is not None:
                raise operation.error
            assert operation.plan is not None
            return operation.plan.result()
        finally:
            self._operations.discard(operation)
            operation.error = None  # it knows this frame: leave no cycle

    def _step(self, operation: _Operation) -> None:
        """Handle the next thing that happens: an answer, a retry that is due, the operation's deadline, close()."""
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            self._submit(heapq.heappop(self._waiting)[2])
        wake_at = min(operation.deadline, self._waiting[0][0] if self._waiting else operation.deadline)
        ticket = next((run.ticket for run in operation.runs), None)
        if self._reads and ticket is not None:
            ticket.read_for(self._settled, wake_at)
        try:
            settled = self._settled.get(timeout=max(0.0, wake_at - time.monotonic()))
        except queue.Empty:
            if time.monotonic() >= operation.deadline and operation.runs:
                operation.fail(TimeoutError(f"no answer within {operation.timeout_s:g} s"))
            return
        if settled is not None:
            self._settle(*settled)
        elif self._client._closed.is_set():
            for each in self._operations:
                if each.runs:
                    each.fail(ClosedError(CLOSED_IN_FLIGHT))

    def _settle(self, run: _Run, outcome: Outcome) -> None:
        operation = run.operation
        if run not in operation.runs:
            return  # the operation was over before this answer came
        if not isinstance(outcome, ExpertdError):
            assert operation.plan is not None
            try:
                operation.plan.answer(run.index, outcome)
            except ExpertdError as error:
                outcome = error.with_traceback(None)  # which knows this frame: leave no cycle
        if isinstance(outcome, ExpertdError):
            self._failed(run, outcome)
            return
        operation.runs.discard(run)
        if not operation.runs:
            self._send_unanswered(operation)

    def _failed(self, run: _Run, error: ExpertdError) -> None:
        self._client._forget(error)
        delay = run.retries.delay_s(error, time.monotonic())
        if delay is None:
            run.operation.fail(error)
        else:
            run.ticket = None
            heapq.heappush(self._waiting, (time.monotonic() + delay, next(self._tie), run))

    def _send_unanswered(self, operation: _Operation) -> None:
        assert operation.plan is not None
        parts = operation.plan.unanswered()
        runs = [
            _Run(operation, index, part, self._client._retries(operation.deadline)) for index, part in parts.items()
        ]
        operation.runs.update(runs)
        for run in runs:
            self._submit(run)

    def _submit(self, run: _Run) -> None:
        if run not in run.operation.runs:
            return
        on_done = functools.partial(self._arrived, run)
        reads = self._reads and len(run.operation.runs) == 1
        try:
            run.ticket = self._client._transport.submit(run.part.encode(), run.operation.deadline, on_done, reads=reads)
        except ExpertdError as error:
            run.operation.fail(error)
