"""The synchronous client."""

from __future__ import annotations

import itertools
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
    GET_LAYER,
    GET_SERVER_INFO,
    HEALTH_CHECK,
    LIST_LAYERS,
    READY_POLL_S,
    BaseClient,
    channel_credentials,
    channel_options,
    health_service,
    layer_info,
)
from expertd._pipeline import Operation, Pipeline
from expertd._plan import Plan, PreparedRequest
from expertd._transport import Slots, StreamTransport, Transport, UnaryTransport
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
from expertd.prepared import PreparedForward
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
        self._pipelines: set[Pipeline] = set()

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
        with Pipeline(self, reads=True) as pipeline:
            return pipeline.wait(pipeline.start(request))

    def prepare(self, request: ForwardRequest[ArrayT]) -> PreparedForward[ArrayT]:
        """A forward to make many times, on these arrays and what they hold by then: `run` it, or `start` and `wait`.

        The request is checked here once, so that each call costs less: much less with all arrays and `out` of `empty`.
        Leave the arrays' shapes and memory as they are, what they hold is read at each call. Asks the server for the
        layer where it is not known. Raises ExpertdError: see `expertd.errors`.
        """
        return PreparedForward(self, request)

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
        So many are taken before the first result comes: their iterable must not wait for results.
        A failure is raised in its place and ends the iteration; with return_exceptions it is yielded instead.
        """
        with Pipeline(self) as pipeline:
            ahead: deque[Operation] = deque()
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
