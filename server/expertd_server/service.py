"""expertd.v1.ExpertService: the methods, on top of the store and the engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc

from expertd.v1 import expertd_pb2 as pb
from expertd_server.calls import Calls
from expertd_server.errors import OverloadedError, RequestTimeoutError
from expertd_server.event_loop import EventLoop, Inbox
from expertd_server.interceptor import guarded, request_id_of
from expertd_server.messages import read_message
from expertd_server.promise import Promise
from expertd_server.region_door import RegionDoor
from expertd_server.regions import StreamRegions
from expertd_server.store import Held
from expertd_server.stream import Stream
from expertd_server.timing import ForwardTiming
from expertd_server.types import MAX_NUM_EXPERTS
from expertd_server.wire_answer import layer_info
from expertd_server.wire_check import checked_name

__all__ = ["SERVICE_NAME", "ExpertService", "ServerFacts"]

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["ExpertService"].full_name

# What a caller is told who finds as many calls of its kind as may be.
_BUSY_RETRY_DELAY_S = 0.1


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """What GetServerInfo tells that does not change."""

    server_version: str
    backend: str
    device: str
    max_queue_tokens: int
    instance_id: str


class ExpertService:
    """The service. Errors are raised; `guarded` turns them into statuses.

    Everything runs in the event loop but `begin_drain` and `wait_idle`, which are for other threads.
    region_door: where callers hand in memory; None: nowhere. max_region_bytes: most of one stream. on_streams: told how
    many are open.
    """

    def __init__(
        self,
        calls: Calls,
        facts: ServerFacts,
        loop: EventLoop,
        *,
        max_unary_requests: int,
        max_streams: int,
        max_stream_requests: int,
        max_stream_answer_bytes: int,
        region_door: RegionDoor | None = None,
        max_region_bytes: int = 0,
        on_streams: Callable[[int], object] | None = None,
    ) -> None:
        self.facts = facts
        self._calls = calls
        self._loop = loop
        self._inbox = Inbox(loop)
        self._max_unary_requests = max_unary_requests
        self._max_streams = max_streams
        self._max_stream_requests = max_stream_requests
        self._max_stream_answer_bytes = max_stream_answer_bytes
        self._region_door = region_door
        self._max_region_bytes = 0 if region_door is None else max_region_bytes
        self._on_streams = on_streams
        self._changed = threading.Condition()
        self._unary_calls = 0
        self._streams: set[Stream] = set()
        self._is_draining = False
        calls.metrics.watch_calls(lambda: calls.in_flight, lambda: len(self._streams))

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Every method, as gRPC serves it.

        NOTE: the data methods have identity serializers: they are given and give bytes. Handlers that a generated
        add_ExpertServiceServicer_to_server registers would win over these, so do not call it.
        """
        metrics = self._calls.metrics
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Forward": grpc.unary_unary_rpc_method_handler(
                    guarded("Forward", self.forward, metrics, counts_itself=True)
                ),
                "ForwardStream": grpc.stream_stream_rpc_method_handler(
                    guarded("ForwardStream", self.forward_stream, metrics, counts_itself=True)
                ),
                "ListLayers": _unary(guarded("ListLayers", self.list_layers, metrics), pb.ListLayersRequest),
                "GetLayer": _unary(guarded("GetLayer", self.get_layer, metrics), pb.GetLayerRequest),
                "GetServerInfo": _unary(
                    guarded("GetServerInfo", self.get_server_info, metrics), pb.GetServerInfoRequest
                ),
            },
        )

    async def forward(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        """One serialised ForwardRequest to one serialised ForwardResponse."""
        calls = self._calls
        arrived_s = calls.clock()
        self._enter_unary(context)
        timeout_s = calls.request_timeout_s
        time_remaining_s = context.time_remaining()
        if time_remaining_s is not None:
            timeout_s = min(timeout_s, time_remaining_s)
        sent: list[tuple[float, ForwardTiming]] = []

        def encode(result: Any) -> bytes:
            sent.append((calls.clock(), result.timing))
            return calls.codec.write_answer(result, calls.queue_depth_tokens)

        promise = calls.admit(read_message(data), arrived_s, timeout_s, encode)
        del data
        calls.hurry()
        try:
            await self._kept(promise, arrived_s + timeout_s - calls.clock())
            answer = promise.result(timeout=0)
        except RequestTimeoutError:
            raise
        except TimeoutError:
            raise RequestTimeoutError(f"not computed within {timeout_s:.3f} s; allow more time or ask less") from None
        finally:
            promise.cancel()  # of no effect once it runs
            del promise  # its error knows this frame: leave no cycle
        calls.answered("Forward", arrived_s, *sent[-1])
        return answer

    async def forward_stream(self, _: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Serialised ForwardStreamRequests to serialised ForwardStreamResponses."""
        stream = Stream(
            self._calls,
            context,
            self._inbox,
            regions=StreamRegions(
                self._region_door,
                self._max_region_bytes,
                copies_logits=not self._calls.codec.CHECKS_LOGITS_AGAIN,
                max_copied_bytes=self._calls.max_batch_tokens * MAX_NUM_EXPERTS * 4,  # float32 logits
            ),
            max_requests=self._max_stream_requests,
            max_tokens=2 * self._calls.max_batch_tokens,
            max_answer_bytes=self._max_stream_answer_bytes,
            log_id=request_id_of(context),
        )
        self._enter_stream(stream, context)
        await stream.run()

    async def list_layers(self, _request: pb.ListLayersRequest, _context: object) -> pb.ListLayersResponse:
        """Every layer, sorted by name."""
        return pb.ListLayersResponse(layers=[self._describe(held) for held in self._calls.store.all_held()])

    async def get_layer(self, request: pb.GetLayerRequest, _context: object) -> pb.GetLayerResponse:
        """One layer by name."""
        return pb.GetLayerResponse(layer=self._describe(self._calls.store.held(checked_name(request.layer))))

    async def get_server_info(self, _request: pb.GetServerInfoRequest, _context: object) -> pb.GetServerInfoResponse:
        """What this server is and takes."""
        facts = self.facts
        return pb.GetServerInfoResponse(
            server_version=facts.server_version,
            backend=facts.backend,
            device=facts.device,
            max_batch_tokens=self._calls.max_batch_tokens,
            max_message_bytes=self._calls.max_message_bytes,
            max_queue_tokens=facts.max_queue_tokens,
            draining=self._is_draining,
            instance_id=facts.instance_id,
            max_region_bytes=self._max_region_bytes,
        )

    def begin_drain(self) -> None:
        """Say so in GetServerInfo, and close every stream, of now and later, once nothing of it is in flight."""
        self._is_draining = True
        self._inbox.post(self._close_streams)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until gRPC has finished with every Forward and ForwardStream call; False when some are left."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._unary_calls or self._streams), timeout_s)

    def _close_streams(self) -> None:
        for stream in list(self._streams):
            stream.close()

    def _describe(self, held: Held[Any]) -> pb.LayerInfo:
        return layer_info(held.current, held.weights_versions, is_loading=self._calls.store.is_loading)

    async def _kept(self, promise: Promise[bytes], timeout_s: float) -> None:
        """Wait for a promise. Raises TimeoutError."""
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()

        def end(error: Exception | None = None) -> None:
            if over.done():
                return
            if error is None:
                over.set_result(None)
            else:
                over.set_exception(error)

        patience = loop.call_later(max(0.0, timeout_s), end, TimeoutError())
        promise.add_done_callback(lambda _: self._inbox.post(end))
        try:
            await over
        finally:
            patience.cancel()

    def _enter_unary(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        if self._unary_calls >= self._max_unary_requests:
            raise OverloadedError(
                f"{self._unary_calls} Forward calls run, at most {self._max_unary_requests} may (max_unary_requests); "
                f"come back in {_BUSY_RETRY_DELAY_S} s, or send them over one ForwardStream",
                _BUSY_RETRY_DELAY_S,
            )
        self._unary_calls += 1
        self._calls.in_flight += 1
        context.add_done_callback(self._leave_unary)  # type: ignore[arg-type]

    def _leave_unary(self, _: object) -> None:
        self._calls.in_flight -= 1
        self._unary_calls -= 1
        self._tell_idle()

    def _enter_stream(self, stream: Stream, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        if len(self._streams) >= self._max_streams:
            raise OverloadedError(
                f"{len(self._streams)} streams are open, at most {self._max_streams} may be (max_streams); come "
                f"back in {_BUSY_RETRY_DELAY_S} s, or send more requests over fewer streams",
                _BUSY_RETRY_DELAY_S,
            )
        self._streams.add(stream)
        if self._on_streams is not None:
            self._on_streams(len(self._streams))
        if self._is_draining:
            stream.close()
        context.add_done_callback(lambda _: self._leave_stream(stream))  # type: ignore[arg-type]

    def _leave_stream(self, stream: Stream) -> None:
        self._streams.discard(stream)
        if self._on_streams is not None:
            self._on_streams(len(self._streams))
        self._tell_idle()

    def _tell_idle(self) -> None:
        if not (self._unary_calls or self._streams):
            with self._changed:
                self._changed.notify_all()


def _unary(behaviour: Callable[[Any, Any], Awaitable[Any]], request: Any) -> grpc.RpcMethodHandler[Any, Any]:
    return grpc.unary_unary_rpc_method_handler(
        behaviour,
        request_deserializer=request.FromString,
        response_serializer=lambda message: message.SerializeToString(),
    )
