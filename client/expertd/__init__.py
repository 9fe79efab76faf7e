"""Client SDK of expertd: a mixture-of-experts layer served over gRPC.

    import expertd

    with expertd.Client("localhost:50051") as client:
        result = client.forward("model.layers.0", hidden_states, routing_logits=router_logits)

ExpertGroup uses many servers, each with a slice of the experts, as one. Client and AsyncClient have the same methods,
and so have ExpertGroup and AsyncExpertGroup. Arrays are numpy (with ml_dtypes for bfloat16 and float8_e4m3fn) or torch;
results come as the same kind. Importing expertd imports neither torch nor anything that needs a compiler.
"""

from expertd.aio import AsyncClient
from expertd.aio_group import AsyncExpertGroup
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
    OverloadedError,
    ProtocolError,
    ServerError,
    TimeoutError,
    TopologyError,
    UnavailableError,
    VersionNotHeldError,
)
from expertd.group import ExpertGroup
from expertd.group_types import GroupConfig, GroupResult, PartReport
from expertd.types import (
    Activation,
    ForwardRequest,
    ForwardResult,
    LayerInfo,
    LayerState,
    RoutingMethod,
    ServerInfo,
    Timing,
)

__version__ = "0.1.0"

__all__ = [
    "AccessDeniedError",
    "Activation",
    "AsyncClient",
    "AsyncExpertGroup",
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
    "MessageTooLargeError",
    "NoReplicaError",
    "OverloadedError",
    "PartReport",
    "ProtocolError",
    "RetryPolicy",
    "RoutingMethod",
    "ServerError",
    "ServerInfo",
    "TimeoutError",
    "Timing",
    "TopologyError",
    "UnavailableError",
    "VersionNotHeldError",
]
