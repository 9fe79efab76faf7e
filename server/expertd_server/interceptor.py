"""What every call of the service has around it: one place where errors become statuses and requests are counted."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.rpc import code_pb2
from grpc_status import rpc_status

from expertd_server.metrics import Metrics
from expertd_server.status import status_of

__all__ = ["ServiceInterceptor", "request_id_of"]

REQUEST_ID_HEADER = "x-request-id"

# They count their own answers, with the time that each took.
_DATA_METHODS = frozenset({"Forward", "ForwardStream"})

_GOOD_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def request_id_of(context: grpc.ServicerContext) -> str:
    """The caller's x-request-id where it is printable and short, else a new one; it appears in log lines."""
    for key, value in context.invocation_metadata():
        if key == REQUEST_ID_HEADER and isinstance(value, str) and _GOOD_REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex[:16]


class ServiceInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs alone
    """Wraps the handlers of one service: an exception becomes a rich status, and the call is counted by its code.

    service: full name, such as "expertd.v1.ExpertService"; other services pass through.
    Answers of the data methods are counted where they are made; here, their errors and everything of other methods.
    """

    def __init__(self, service: str, metrics: Metrics) -> None:
        self._prefix = f"/{service}/"
        self._metrics = metrics

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Called by gRPC for each call, before its handler runs."""
        handler = continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        method = handler_call_details.method.removeprefix(self._prefix)
        serializers = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(self._stream(method, handler.stream_stream), **serializers)
        return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), **serializers)

    def _unary(self, method: str, behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                answer = behaviour(request, context)
            except Exception as error:
                return self._abort(method, error, context)
            if method not in _DATA_METHODS:
                self._metrics.requests.labels(method, "OK").inc()
            return answer

        return call

    def _stream(self, method: str, behaviour: Callable[[Any, Any], Iterator[Any]]) -> Callable[[Any, Any], Any]:
        def call(requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                yield from behaviour(requests, context)
            except Exception as error:
                self._abort(method, error, context)

        return call

    def _abort(self, method: str, error: Exception, context: grpc.ServicerContext) -> None:
        status = status_of(error, request_id_of(context))
        self._metrics.requests.labels(method, code_pb2.Code.Name(status.code)).inc()
        context.abort_with_status(rpc_status.to_status(status))
