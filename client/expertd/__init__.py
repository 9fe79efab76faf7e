"""Client SDK of expertd: a mixture-of-experts layer served over gRPC.

    import expertd

    with expertd.Client("localhost:50051") as client:
        result = client.forward("model.layers.0", hidden_states, routing_logits=router_logits)

Client and AsyncClient have the same methods. Arrays are numpy (with ml_dtypes for bfloat16 and float8_e4m3fn) or torch;
results come as the same kind. Importing expertd imports neither torch nor anything that needs a compiler.
"""

from expertd.aio import AsyncClient
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
    "CancelledError",
    "Client",
    "ClientConfig",
    "ClosedError",
    "ConfigError",
    "ExpertdError",
    "FieldViolation",
    "ForwardRequest",
    "ForwardResult",
    "InvalidRequestError",
    "LayerInfo",
    "LayerNotFoundError",
    "LayerState",
    "MessageTooLargeError",
    "NoReplicaError",
    "OverloadedError",
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
