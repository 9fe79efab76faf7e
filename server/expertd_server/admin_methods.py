"""expertd.v1.AdminService as gRPC knows it, and what is answered where it is not served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn

import grpc

from expertd.v1 import expertd_pb2 as pb
from expertd_server.config import Config
from expertd_server.errors import AdminNotHereError
from expertd_server.interceptor import guarded
from expertd_server.metrics import Metrics

__all__ = ["ADMIN_SERVICE_NAME", "admin_handler", "not_here_handler"]

ADMIN_SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["AdminService"].full_name

_REQUESTS: Final[dict[str, Any]] = {
    "LoadLayer": pb.LoadLayerRequest,
    "SwapWeights": pb.SwapWeightsRequest,
    "UnloadLayer": pb.UnloadLayerRequest,
    "Drain": pb.DrainRequest,
}
"""By method, in the order of `admin_handler`."""


def not_here_handler(config: Config, metrics: Metrics) -> grpc.GenericRpcHandler[Any, Any]:
    """What the data port, which runs in an event loop, answers to every method."""
    if config.admin:
        message = f"AdminService is answered on {config.admin_host}:{config.admin_port} (admin_host, admin_port) only"
    else:
        message = "AdminService is off; start the server with --admin (EXPERTD_ADMIN=on)"

    async def refuse(_request: object, _context: object) -> NoReturn:
        raise AdminNotHereError(message)

    return admin_handler(*(guarded(method, refuse, metrics) for method in _REQUESTS))


def admin_handler(
    load_layer: Callable[..., Any],
    swap_weights: Callable[..., Any],
    unload_layer: Callable[..., Any],
    drain: Callable[..., Any],
) -> grpc.GenericRpcHandler[Any, Any]:
    """Every method, as gRPC serves it."""
    behaviours = (load_layer, swap_weights, unload_layer, drain)
    return grpc.method_handlers_generic_handler(
        ADMIN_SERVICE_NAME,
        {
            name: grpc.unary_unary_rpc_method_handler(
                behaviour,
                request_deserializer=request.FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
            for (name, request), behaviour in zip(_REQUESTS.items(), behaviours, strict=True)
        },
    )
