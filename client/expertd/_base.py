"""Everything that the synchronous and the asynchronous client share: what they know, and every decision without I/O."""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError

from expertd._plan import Plan, PreparedRequest
from expertd._retry import Retries
from expertd._seconds import checked_timeout_s
from expertd._shm import WantedMemory
from expertd._wire_read import Response, nbytes_of, read_answer, read_stream_answer
from expertd.config import ClientConfig
from expertd.errors import (
    ConfigError,
    ExpertdError,
    ProtocolError,
    UnavailableError,
    code_from_number,
    error_from_status,
)
from expertd.tensors import from_message
from expertd.types import Activation, LayerInfo, LayerState, RoutingMethod, ServerInfo
from expertd.v1 import expertd_pb2 as pb

__all__ = [
    "CLOSED_IN_FLIGHT",
    "FORWARD",
    "FORWARD_STREAM",
    "GET_LAYER",
    "GET_SERVER_INFO",
    "HEALTH_CHECK",
    "LIST_LAYERS",
    "READY_POLL_S",
    "BaseClient",
    "Metadata",
    "NewMetadata",
    "Outcome",
    "channel_credentials",
    "channel_options",
    "health_service",
    "parse",
    "stream_outcome",
    "timeout_ms",
    "unary_outcome",
]

_SERVICE = "/expertd.v1.ExpertService"
FORWARD = f"{_SERVICE}/Forward"
FORWARD_STREAM = f"{_SERVICE}/ForwardStream"
LIST_LAYERS = f"{_SERVICE}/ListLayers"
GET_LAYER = f"{_SERVICE}/GetLayer"
GET_SERVER_INFO = f"{_SERVICE}/GetServerInfo"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"

Outcome: TypeAlias = Response | ExpertdError
Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]

MessageT = TypeVar("MessageT")

NewMetadata: TypeAlias = Callable[[], tuple[Metadata, str | None]]
READY_POLL_S = 0.1
CLOSED_IN_FLIGHT = "the client was closed with the request in flight"

_MAX_UINT32 = 2**32 - 1
# Streams of several channels, and of several clients, spread over all addresses that the target's name stands for.
_SERVICE_CONFIG = '{"loadBalancingConfig": [{"round_robin": {}}]}'
_PEM_MARKS: dict[Literal["ca", "cert", "key"], re.Pattern[bytes]] = {
    "ca": re.compile(rb"-----BEGIN (.* )?CERTIFICATE-----"),
    "cert": re.compile(rb"-----BEGIN (.* )?CERTIFICATE-----"),
    "key": re.compile(rb"-----BEGIN (.* )?PRIVATE KEY-----"),
}


class BaseClient:
    """Configuration, metadata and what the client has learned about its server."""

    def __init__(self, config: ClientConfig | str) -> None:
        """config: a ClientConfig, or a target such as "localhost:50051" with every option at its default."""
        self.config = ClientConfig(config) if isinstance(config, str) else config
        self._rng = random.Random()
        self._known_server: ServerInfo | None = None
        self._known_layers: dict[str, LayerInfo] = {}
        self.on_unwanted: Callable[[int], None] = _ignore
        """Told, from any thread, the bytes of each answer that comes when nobody waits for it any more."""
        self._wanted_memory: WantedMemory | None = None
        if self.config.transport in ("auto", "shm"):
            self._wanted_memory = WantedMemory(
                self.config.target,
                self.config.shared_memory_bytes,
                is_required=self.config.transport == "shm",
                max_in_flight=self.config.max_in_flight,
            )

    def _unwanted(self, response: Response) -> None:
        self.on_unwanted(nbytes_of(response))

    def _metadata(self) -> tuple[Metadata, str | None]:
        """Metadata of one call or stream, and the request id in it."""
        if not self.config.send_request_id:
            return self.config.metadata, None
        request_id = uuid.uuid4().hex
        return (*self.config.metadata, ("x-request-id", request_id)), request_id

    def _retries(self, deadline: float) -> Retries:
        return Retries(self.config.retry, deadline, self._rng)

    def _timeout_s(self, timeout_s: float | None) -> float:
        """The caller's timeout or the client's. Raises InvalidRequestError when it cannot be waited for."""
        return self.config.timeout_s if timeout_s is None else checked_timeout_s(timeout_s)

    def _learn_server(self, response: pb.GetServerInfoResponse) -> ServerInfo:
        if response.max_batch_tokens < 1:
            raise ProtocolError("max_batch_tokens of the server's answer is 0, expected at least 1")
        if self._wanted_memory is not None:
            self._wanted_memory.limit = response.max_region_bytes
        self._known_server = ServerInfo(
            server_version=response.server_version,
            backend=response.backend,
            device=response.device,
            max_batch_tokens=response.max_batch_tokens,
            max_message_bytes=response.max_message_bytes,
            max_queue_tokens=response.max_queue_tokens,
            draining=response.draining,
            instance_id=response.instance_id,
            max_region_bytes=response.max_region_bytes,
        )
        return self._known_server

    def _learn_layer(self, message: pb.LayerInfo) -> LayerInfo:
        layer = layer_info(message)
        self._known_layers[layer.name] = layer
        return layer

    def _forget(self, error: BaseException) -> None:
        """Another server, or the same one restarted with other limits, may answer next."""
        if isinstance(error, UnavailableError):
            self._known_server = None
            self._known_layers.clear()

    def _plan(self, request: PreparedRequest, server: ServerInfo, layer: LayerInfo) -> Plan:
        # 0: a server that does not say; gRPC itself has no limit then.
        limits = [limit for limit in (self.config.max_message_bytes, server.max_message_bytes) if limit]
        return Plan(request, request.max_rows(layer, server.max_batch_tokens, min(limits)))


def _ignore(_: int) -> None:
    pass


def layer_info(message: pb.LayerInfo) -> LayerInfo:
    """A LayerInfo message as the caller sees it. Raises ProtocolError when it holds an enum value that is not known."""
    try:
        # The wire counts the published ids from 1, because protobuf reserves 0 for "not set".
        routing_method = RoutingMethod(message.routing_method - 1)
        activation = Activation(message.activation - 1)
        state = {pb.LAYER_STATE_LOADING: LayerState.LOADING, pb.LAYER_STATE_READY: LayerState.READY}[message.state]
    except (ValueError, KeyError) as error:
        raise ProtocolError(
            f"layer {message.name!r} has routing method {message.routing_method}, activation {message.activation} and "
            f"state {message.state}, not all of which this version of expertd knows; upgrade it"
        ) from error
    has_bias = message.HasField("routing_bias")
    return LayerInfo(
        name=message.name,
        hidden_size=message.hidden_size,
        intermediate_size=message.intermediate_size,
        num_experts=message.num_experts,
        local_expert_offset=message.local_expert_offset,
        local_num_experts=message.local_num_experts,
        top_k=message.top_k,
        routing_method=routing_method,
        activation=activation,
        n_group=message.n_group,
        topk_group=message.topk_group,
        routed_scaling_factor=message.routed_scaling_factor if message.HasField("routed_scaling_factor") else None,
        norm_topk_prob=message.norm_topk_prob,
        use_routing_scales_on_input=message.use_routing_scales_on_input,
        hidden_states_scale=message.hidden_states_scale if message.HasField("hidden_states_scale") else None,
        routing_bias=from_message("routing_bias", message.routing_bias).numpy() if has_bias else None,
        weights_version=message.weights_version,
        weights_versions=tuple(message.weights_versions),
        weights_bytes=message.weights_bytes,
        weights_fingerprint=message.weights_fingerprint,
        state=state,
    )


def channel_options(config: ClientConfig, index: int) -> list[tuple[str, Any]]:
    """gRPC's channel arguments for channel number `index`."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", round(config.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(config.keepalive_timeout_s * 1000)),
        # However long nothing is said over a connection: the messages of a stream may go through shared memory.
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.service_config", _SERVICE_CONFIG),
        # The SDK retries itself: gRPC's own retries hold at most 256 KiB, less than a batch of tokens.
        ("grpc.enable_retries", 0),
        # gRPC's default backs off for up to two minutes, far past the deadline of any request.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # Channels of one process share a connection when their arguments are equal; these must not.
        ("grpc.use_local_subchannel_pool", 1),
        ("expertd.channel_index", index),
    ]
    if config.server_name is not None:
        options.append(("grpc.ssl_target_name_override", config.server_name))
        options.append(("grpc.default_authority", config.server_name))
    return options


def channel_credentials(config: ClientConfig) -> grpc.ChannelCredentials | None:
    """TLS credentials; None: plain text. Raises ConfigError when a file cannot be read or is no PEM of its kind."""
    if not config.uses_tls:
        return None
    # NOTE: gRPC says to its own log alone what is wrong with them, and to callers that the server cannot be reached.
    for name, mark in _PEM_MARKS.items():
        pem = config.pem(name)
        if pem is not None and not mark.search(pem):
            given = f"{name}_pem" if getattr(config, f"{name}_file") is None else f"{name}_file"
            raise ConfigError(f"{given} holds no {mark.pattern.decode()!r}, expected PEM")
    return grpc.ssl_channel_credentials(
        root_certificates=config.pem("ca"), private_key=config.pem("key"), certificate_chain=config.pem("cert")
    )


def health_service(layer: str | None) -> str:
    """The name under which grpc.health.v1 knows a layer; the empty name is the whole server."""
    return layer or ""


def unary_outcome(data: bytes) -> Response:
    """A ForwardResponse, as it came. Raises ProtocolError when it is none."""
    return read_answer(data) or parse(pb.ForwardResponse.FromString, data)


def stream_outcome(data: bytes, request_id: str | None) -> tuple[int, Outcome | pb.RegionTicket]:
    """The id of a ForwardStreamResponse, and what it says. Raises ProtocolError when it is none."""
    answer = read_stream_answer(data)
    if answer is not None:
        return answer
    message = parse(pb.ForwardStreamResponse.FromString, data)
    return message.id, _outcome(message, request_id)


def _outcome(message: pb.ForwardStreamResponse, request_id: str | None) -> Outcome | pb.RegionTicket:
    match message.WhichOneof("result"):
        case "response":
            return message.response
        case "region_ticket":
            return message.region_ticket
        case "error":
            status = message.error
            return error_from_status(
                code_from_number(status.code), status.message, status.details, request_id=request_id
            )
        case _:
            return ProtocolError("an answer of the stream holds neither a response nor an error")


def unasked_ticket() -> ProtocolError:
    """What is wrong with a RegionTicket in place of a response."""
    return ProtocolError("an answer of the stream holds a region_ticket, which its request did not ask for")


def timeout_ms(remaining_s: float) -> int:
    """A remaining time as ForwardStreamRequest carries it; never 0, which would mean none."""
    return min(max(1, round(remaining_s * 1000)), _MAX_UINT32)


def parse(decode: Callable[[bytes], MessageT], data: bytes) -> MessageT:
    """Decode an answer. Raises ProtocolError when it is not the message that it should be."""
    try:
        return decode(data)
    except DecodeError as error:
        raise ProtocolError(f"{len(data)} bytes of the answer are not a message of expertd.v1: {error}") from error
