"""Client SDK of expertd: a mixture-of-experts layer served over gRPC.

    import expertd

    with expertd.Client("localhost:50051") as client:
        result = client.forward("model.layers.0", hidden_states, routing_logits=router_logits)

ExpertGroup uses many servers, each with a slice of the experts, as one; AdminClient replaces the weights of a running
server. AsyncClient, AsyncExpertGroup and AsyncAdminClient have the same methods. Arrays are numpy (with ml_dtypes for
bfloat16 and float8_e4m3fn) or torch; results come as the same kind. Importing expertd imports neither torch nor what
needs a compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertd.admin import AdminClient
    from expertd.aio import AsyncClient
    from expertd.aio_admin import AsyncAdminClient
    from expertd.aio_group import AsyncExpertGroup
    from expertd.aio_prepared import AsyncPreparedForward
    from expertd.client import Client
    from expertd.config import ClientConfig, RetryPolicy
    from expertd.errors import (
        AccessDeniedError,
        CancelledError,
        ClosedError,
        ConfigError,
        ExpertdError,
        FieldViolation,
        InvalidRequestError,
        LayerNotFoundError,
        MessageTooLargeError,
        NoReplicaError,
        OrderRefusedError,
        OverloadedError,
        ProtocolError,
        ServerError,
        SharedMemoryError,
        TimeoutError,
        TopologyError,
        UnavailableError,
        VersionNotHeldError,
    )
    from expertd.group import ExpertGroup
    from expertd.group_types import GroupConfig, GroupResult, PartReport
    from expertd.prepared import PreparedForward
    from expertd.types import (
        Activation,
        ForwardRequest,
        ForwardResult,
        LayerInfo,
        LayerState,
        LoadedVersion,
        RoutingMethod,
        ServerInfo,
        SwappedVersion,
        Timing,
        UnloadedVersion,
    )

__version__ = "0.1.0"

__all__ = [
    "AccessDeniedError",
    "Activation",
    "AdminClient",
    "AsyncAdminClient",
    "AsyncClient",
    "AsyncExpertGroup",
    "AsyncPreparedForward",
    "CancelledError",
    "Client",
    "ClientConfig",
    "ClosedError",
    "ConfigError",
    "ExpertGroup",
    "ExpertdError",
    "FieldViolation",
    "ForwardRequest",
    "ForwardResult",
    "GroupConfig",
    "GroupResult",
    "InvalidRequestError",
    "LayerInfo",
    "LayerNotFoundError",
    "LayerState",
    "LoadedVersion",
    "MessageTooLargeError",
    "NoReplicaError",
    "OrderRefusedError",
    "OverloadedError",
    "PartReport",
    "PreparedForward",
    "ProtocolError",
    "RetryPolicy",
    "RoutingMethod",
    "ServerError",
    "ServerInfo",
    "SharedMemoryError",
    "SwappedVersion",
    "TimeoutError",
    "Timing",
    "TopologyError",
    "UnavailableError",
    "UnloadedVersion",
    "VersionNotHeldError",
]

# Each name is imported when it is first used: a worker that calls one server does not wait for asyncio and groups.
_NAMES_OF = {
    "admin": ("AdminClient",),
    "aio": ("AsyncClient",),
    "aio_admin": ("AsyncAdminClient",),
    "aio_group": ("AsyncExpertGroup",),
    "aio_prepared": ("AsyncPreparedForward",),
    "client": ("Client",),
    "config": ("ClientConfig", "RetryPolicy"),
    "errors": (
        "AccessDeniedError",
        "CancelledError",
        "ClosedError",
        "ConfigError",
        "ExpertdError",
        "FieldViolation",
        "InvalidRequestError",
        "LayerNotFoundError",
        "MessageTooLargeError",
        "NoReplicaError",
        "OrderRefusedError",
        "OverloadedError",
        "ProtocolError",
        "ServerError",
        "SharedMemoryError",
        "TimeoutError",
        "TopologyError",
        "UnavailableError",
        "VersionNotHeldError",
    ),
    "group": ("ExpertGroup",),
    "group_types": ("GroupConfig", "GroupResult", "PartReport"),
    "prepared": ("PreparedForward",),
    "types": (
        "Activation",
        "ForwardRequest",
        "ForwardResult",
        "LayerInfo",
        "LayerState",
        "LoadedVersion",
        "RoutingMethod",
        "ServerInfo",
        "SwappedVersion",
        "Timing",
        "UnloadedVersion",
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
