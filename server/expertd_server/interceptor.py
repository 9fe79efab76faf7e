"""What every call of the service has around it: one place where errors become statuses and requests are counted.

The data port runs in an event loop, where handlers are wrapped once, when they are registered. Orders run in threads,
see `AdminEndpoint`; there an interceptor does the same.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.rpc import code_pb2
from grpc_status import rpc_status

from expertd_server.metrics import Metrics
from expertd_server.status import status_of

__all__ = ["ServiceInterceptor", "guarded", "request_id_of"]

REQUEST_ID_HEADER = "x-request-id"

_GOOD_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def request_id_of(context: Any) -> str:
    """The caller's x-request-id where it is printable and short, else a new one; it appears in log lines.

    context: a ServicerContext of either kind.
    """
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_HEADER and isinstance(value, str) and _GOOD_REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex[:16]


def guarded(
    method: str, behaviour: Callable[[Any, Any], Awaitable[Any]], metrics: Metrics, *, counts_itself: bool = False
) -> Callable[[Any, Any], Awaitable[Any]]:
    """A handler of grpc.aio whose exceptions become rich statuses, and whose calls are counted by their code.

    counts_itself: the behaviour counts its own answers, with the time that each took; only errors are counted here.
    """

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            answer = await behaviour(request, context)
        except Exception as error:
            status = status_of(error, request_id_of(context))
        else:
            if not counts_itself:
                metrics.requests.labels(method, "OK").inc()
            return answer
        metrics.requests.labels(method, code_pb2.Code.Name(status.code)).inc()
        return await context.abort_with_status(rpc_status.to_status(status))  # type: ignore[attr-defined]

    return call


class ServiceInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs alone
    """Wraps the handlers of one service: an exception becomes a rich status, and the call is counted by its code.

    service: full name, such as "expertd.v1.AdminService", of unary methods; other services pass through.
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
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler.unary_unary),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _unary(self, method: str, behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                answer = behaviour(request, context)
            except Exception as error:
                status = status_of(error, request_id_of(context))
                self._metrics.requests.labels(method, code_pb2.Code.Name(status.code)).inc()
                return context.abort_with_status(rpc_status.to_status(status))
            self._metrics.requests.labels(method, "OK").inc()
            return answer

        return call
