"""expertd.v1.ExpertService: the methods, on top of the store and the engine."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

import grpc

from expertd.v1 import expertd_pb2 as pb
from expertd_server.calls import Calls
from expertd_server.errors import OverloadedError, RequestTimeoutError
from expertd_server.interceptor import request_id_of
from expertd_server.store import Held
from expertd_server.stream import Stream
from expertd_server.wire import checked_name, encode_response, layer_info
from expertd_server.wire_parse import parse_request

__all__ = ["SERVICE_NAME", "ExpertService", "ServerFacts"]

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["ExpertService"].full_name

# What a caller is told who finds every thread of its kind busy.
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
    """The service. Errors are raised; `ServiceInterceptor` turns them into statuses."""

    def __init__(
        self, calls: Calls, facts: ServerFacts, *, max_unary_requests: int, max_streams: int, max_stream_requests: int
    ) -> None:
        self.facts = facts
        self._calls = calls
        self._max_unary_requests = max_unary_requests
        self._max_streams = max_streams
        self._max_stream_requests = max_stream_requests
        self._changed = threading.Condition()
        self._unary_calls = 0
        self._streams: set[Stream] = set()
        self._is_draining = False

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Every method, as gRPC serves it.

        NOTE: the data methods have identity serializers: they are given and give bytes. Handlers that a generated
        add_ExpertServiceServicer_to_server registers would win over these, so do not call it.
        """
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Forward": grpc.unary_unary_rpc_method_handler(self.forward),
                "ForwardStream": grpc.stream_stream_rpc_method_handler(self.forward_stream),
                "ListLayers": _unary(self.list_layers, pb.ListLayersRequest),
                "GetLayer": _unary(self.get_layer, pb.GetLayerRequest),
                "GetServerInfo": _unary(self.get_server_info, pb.GetServerInfoRequest),
            },
        )

    def forward(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        """One serialised ForwardRequest to one serialised ForwardResponse."""
        calls = self._calls
        arrived_s = calls.clock()
        self._enter_unary(context)
        timeout_s = min(context.time_remaining(), calls.request_timeout_s)
        future = calls.admit(parse_request(data), arrived_s, timeout_s)
        if not context.add_callback(functools.partial(_cancel, future)):
            _cancel(future)
        try:
            result = future.result(max(0.0, arrived_s + timeout_s - calls.clock()))
        except RequestTimeoutError:
            raise
        except TimeoutError:
            future.cancel()
            raise RequestTimeoutError(f"not computed within {timeout_s:.3f} s; allow more time or ask less") from None
        finally:
            del future  # its error knows this frame: leave no cycle
        answer = encode_response(result, calls.queue_depth_tokens)
        calls.answered("Forward", arrived_s, result.timing)
        return answer

    def forward_stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Serialised ForwardStreamRequests to serialised ForwardStreamResponses."""
        stream = Stream(
            self._calls,
            requests,
            context,
            max_requests=self._max_stream_requests,
            max_tokens=2 * self._calls.max_batch_tokens,
            log_id=request_id_of(context),
        )
        self._enter_stream(stream, context)
        return stream.answers()

    def list_layers(self, _request: pb.ListLayersRequest, _context: grpc.ServicerContext) -> pb.ListLayersResponse:
        """Every layer, sorted by name."""
        return pb.ListLayersResponse(layers=[self._describe(held) for held in self._calls.store.all_held()])

    def get_layer(self, request: pb.GetLayerRequest, _context: grpc.ServicerContext) -> pb.GetLayerResponse:
        """One layer by name."""
        return pb.GetLayerResponse(layer=self._describe(self._calls.store.held(checked_name(request.layer))))

    def get_server_info(
        self, _request: pb.GetServerInfoRequest, _context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
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
        )

    def begin_drain(self) -> None:
        """Say so in GetServerInfo, and close every stream, of now and later, once nothing of it is in flight."""
        with self._changed:
            self._is_draining = True
            streams = list(self._streams)
        for stream in streams:
            stream.close()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until gRPC has finished with every Forward and ForwardStream call; False when some are left."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._unary_calls or self._streams), timeout_s)

    def _describe(self, held: Held) -> pb.LayerInfo:
        return layer_info(held.current, held.weights_versions, is_loading=self._calls.store.is_loading)

    def _enter_unary(self, context: grpc.ServicerContext) -> None:
        with self._changed:
            if self._unary_calls >= self._max_unary_requests:
                raise OverloadedError(
                    f"{self._unary_calls} Forward calls run, at most {self._max_unary_requests} may (max_unary_requests"
                    f"); come back in {_BUSY_RETRY_DELAY_S} s, or send them over one ForwardStream",
                    _BUSY_RETRY_DELAY_S,
                )
            self._unary_calls += 1
        self._calls.arrived()
        if not context.add_callback(self._leave_unary):
            self._leave_unary()

    def _leave_unary(self) -> None:
        with self._changed:
            self._unary_calls -= 1
            self._changed.notify_all()
        self._calls.left()

    def _enter_stream(self, stream: Stream, context: grpc.ServicerContext) -> None:
        with self._changed:
            if len(self._streams) >= self._max_streams:
                raise OverloadedError(
                    f"{len(self._streams)} streams are open, at most {self._max_streams} may be (max_streams); come "
                    f"back in {_BUSY_RETRY_DELAY_S} s, or send more requests over fewer streams",
                    _BUSY_RETRY_DELAY_S,
                )
            self._streams.add(stream)
            if self._is_draining:
                stream.close()
        self._calls.metrics.open_streams.inc()
        if not context.add_callback(lambda: self._leave_stream(stream)):
            self._leave_stream(stream)

    def _leave_stream(self, stream: Stream) -> None:
        with self._changed:
            self._streams.discard(stream)
            self._changed.notify_all()
        self._calls.metrics.open_streams.dec()


def _cancel(future: Future[Any]) -> None:
    future.cancel()  # of no effect once it runs


def _unary(behaviour: Callable[[Any, grpc.ServicerContext], Any], request: Any) -> grpc.RpcMethodHandler[Any, Any]:
    return grpc.unary_unary_rpc_method_handler(
        behaviour,
        request_deserializer=request.FromString,
        response_serializer=lambda message: message.SerializeToString(),
    )
