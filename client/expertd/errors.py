"""Every error that the SDK raises on purpose, by what the caller should do about it.

ExpertdError
├── InvalidRequestError      fix the request: `violations` names each offending field (also ValueError)
├── MessageTooLargeError     raise ClientConfig.max_message_bytes, or send fewer tokens
├── LayerNotFoundError       ask layers() (also LookupError)
├── VersionNotHeldError      ask for a weights_version that is held, or for none (also LookupError)
├── OrderRefusedError        an order to a server that does not fit what it holds: the message says what to do first
├── AccessDeniedError        fix the credentials or the metadata (also PermissionError)
├── OverloadedError          come back after `retry_after_s`; the SDK has done so until its retries ran out
├── UnavailableError         the server starts, drains or cannot be reached: try again later (also ConnectionError)
│   └── NoReplicaError       no server left for `experts` of a layer: start one, or pass allow_partial
├── TimeoutError             the deadline passed (also the built-in TimeoutError)
├── CancelledError           the request was cancelled
│   └── ClosedError          this client was closed
├── SharedMemoryError        the server is on another machine, or refuses: the message says why; use transport="auto"
├── ServerError              the server failed; its log says why
├── TopologyError            fix what the servers of a group hold, or its topology file: the message names both
├── ProtocolError            the two sides do not speak the same protocol: compare their versions
└── ConfigError              fix the option of ClientConfig: the message names it (also ValueError)

Every error has `code` (grpc.StatusCode), `reason` (the stable word of google.rpc.ErrorInfo), `retryable` (whether the
same request may succeed later) and `request_id` (the x-request-id that was sent, or None). None of them derives from
asyncio.CancelledError, so cancelling a task is never mistaken for one of them.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

__all__ = [
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
]

_DETAILS_KEY = "grpc-status-details-bin"


class ExpertdError(Exception):
    """Root of the tree. Survives pickling, so it can cross process boundaries."""

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    reason: str = "UNKNOWN"
    retryable: bool = False
    request_id: str | None = None


@dataclass(frozen=True)
class FieldViolation:
    """One thing wrong with a request: `field` is a path such as `hidden_states.shape`."""

    field: str
    description: str


class InvalidRequestError(ExpertdError, ValueError):
    """The request cannot be served as it is. Raised by the SDK's own checks and by the server's."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"
    violations: tuple[FieldViolation, ...] = ()

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequestError:
        """One violation; the message is useful without the details."""
        error = cls(f"{field}: {description}")
        error.violations = (FieldViolation(field, description),)
        return error


class MessageTooLargeError(ExpertdError):
    """A message is larger than the client or the server allows."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "MESSAGE_TOO_LARGE"


class LayerNotFoundError(ExpertdError, LookupError):
    """The server holds no layer of that name."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "LAYER_NOT_FOUND"


class VersionNotHeldError(ExpertdError, LookupError):
    """The server holds the layer, but not in the asked version of its weights."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "WEIGHTS_VERSION_NOT_HELD"


class OrderRefusedError(ExpertdError):
    """The server cannot do what AdminClient told it, as things are: `reason` is VERSION_CONFLICT, BAD_CHECKPOINT or
    INSUFFICIENT_MEMORY."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "ORDER_REFUSED"
    needed_bytes: int | None = None
    """Of INSUFFICIENT_MEMORY: bytes that the weights would take."""
    free_bytes: int | None = None
    """Of INSUFFICIENT_MEMORY: bytes that there are for them."""


class AccessDeniedError(ExpertdError, PermissionError):
    """The server does not know the caller, or does not let it in."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "ACCESS_DENIED"


class OverloadedError(ExpertdError):
    """The server's queue is full."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"
    retryable = True
    retry_after_s: float | None = None
    """When the server wants to see the request again; None: it did not say."""


class UnavailableError(ExpertdError, ConnectionError):
    """The server starts, drains or cannot be reached, or the connection broke."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"
    retryable = True
    retry_after_s: float | None = None
    """When the server wants to see the request again; None: it did not say."""


class NoReplicaError(UnavailableError):
    """Every server of a group that holds some experts of a layer was tried, and none answered."""

    reason = "NO_REPLICA"
    layer: str = ""
    experts: tuple[range, ...] = ()
    """The slices of global expert ids that nobody answered for."""


class TimeoutError(ExpertdError, builtins.TimeoutError):
    """The request's deadline passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class CancelledError(ExpertdError):
    """The request was cancelled before it was answered."""

    code = grpc.StatusCode.CANCELLED
    reason = "CANCELLED"


class ClosedError(CancelledError):
    """The client is closed; what was in flight is lost."""

    reason = "CLIENT_CLOSED"


class SharedMemoryError(ExpertdError):
    """transport="shm" was asked for, and no memory can be shared with this server: the message says why."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "NO_SHARED_MEMORY"


class ServerError(ExpertdError):
    """The server failed on a request that it accepted."""

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"


class TopologyError(ExpertdError):
    """The servers of a group do not make up a layer: experts that nobody holds, or servers that disagree."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "BAD_TOPOLOGY"


class ProtocolError(ExpertdError):
    """An answer that this version of the SDK does not understand, or a method that the server does not have."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "PROTOCOL"


class ConfigError(ExpertdError, ValueError):
    """An option of ClientConfig has a value that cannot be used."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "BAD_CONFIG"


_CLASS_BY_CODE: dict[grpc.StatusCode, type[ExpertdError]] = {
    grpc.StatusCode.OK: ProtocolError,  # a failure that says it is none
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimeoutError,
    grpc.StatusCode.NOT_FOUND: LayerNotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: ServerError,
    grpc.StatusCode.PERMISSION_DENIED: AccessDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: AccessDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.FAILED_PRECONDITION: VersionNotHeldError,
    grpc.StatusCode.ABORTED: ServerError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolError,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: ServerError,
}
# Codes that stand for several things, told apart by the reason.
_CLASS_BY_REASON: dict[str, type[ExpertdError]] = dict.fromkeys(
    ("VERSION_CONFLICT", "BAD_CHECKPOINT", "INSUFFICIENT_MEMORY"), OrderRefusedError
)
_CODE_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def code_from_number(number: int) -> grpc.StatusCode:
    """The StatusCode of a google.rpc.Code number; UNKNOWN for a number that gRPC does not define."""
    return _CODE_BY_NUMBER.get(number, grpc.StatusCode.UNKNOWN)


def error_from_status(
    code: grpc.StatusCode, message: str, details: Iterable[AnyMessage] = (), *, request_id: str | None = None
) -> ExpertdError:
    """The error for a status and its google.rpc details. Details of types that it does not know are skipped."""
    details = list(details)
    reason = _reason(details)
    kind = _CLASS_BY_REASON.get(reason, _CLASS_BY_CODE[code])
    # NOTE: a call that reaches a server while it closes its port is ended by gRPC itself, as cancelled, although no
    # caller cancelled it and the service never saw it. What the service cancels carries a reason.
    if code is grpc.StatusCode.CANCELLED and not reason:
        kind = UnavailableError
        message = f"the server ended the call unseen, as one that stops does: {message or code.name}"
    # NOTE: gRPC itself reports a message over the size limit as RESOURCE_EXHAUSTED; trying again would never help.
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        kind = MessageTooLargeError
        message = f"{message}; raise ClientConfig.max_message_bytes or the server's limit"
    error = kind(message or f"the server answered {code.name} without a message")
    error.code = code
    error.request_id = request_id
    for detail in details:
        _apply_detail(error, detail)
    return error


def error_from_trailers(
    code: grpc.StatusCode, message: str, trailers: Iterable[tuple[str, str | bytes]], *, request_id: str | None = None
) -> ExpertdError:
    """The error for a call that ended with these trailing metadata; grpc-status-details-bin holds the details."""
    for key, value in trailers:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                break  # the code and the message still say what happened
            return error_from_status(code, message, status.details, request_id=request_id)
    return error_from_status(code, message, request_id=request_id)


def error_from_rpc(rpc: Any, *, request_id: str | None = None) -> ExpertdError:
    """The error for a finished call of the synchronous gRPC API: a grpc.Call, which every RpcError it raises is too."""
    return error_from_trailers(
        rpc.code() or grpc.StatusCode.UNKNOWN, rpc.details() or "", rpc.trailing_metadata() or (), request_id=request_id
    )


def stream_broken(error: ExpertdError) -> ExpertdError:
    """What the end of a stream with `error` means for a request that was in flight on it.

    A stream that breaks says nothing about the request, which is pure and can be sent again; only when every stream
    would end the same way (no access, no such method, message limits) the error stands as it is.
    """
    if error.retryable or isinstance(error, AccessDeniedError | ProtocolError | MessageTooLargeError | ClosedError):
        return error
    broken = UnavailableError(f"the stream broke with {error.code.name}: {error}")
    broken.request_id = error.request_id
    broken.__cause__ = error
    return broken


def _reason(details: Iterable[AnyMessage]) -> str:
    """The reason of the ErrorInfo among them; empty where there is none that can be read."""
    for detail in details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            try:
                return str(error_details_pb2.ErrorInfo.FromString(detail.value).reason)
            except DecodeError:
                return ""
    return ""


def _apply_detail(error: ExpertdError, detail: AnyMessage) -> None:
    try:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            error.reason = info.reason or error.reason
            if isinstance(error, OrderRefusedError):
                error.needed_bytes, error.free_bytes = (
                    int(text) if (text := info.metadata[name]).isdecimal() else None
                    for name in ("needed_bytes", "free_bytes")
                )
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            if isinstance(error, OverloadedError | UnavailableError):
                error.retry_after_s = delay.seconds + delay.nanos / 1e9
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR) and isinstance(error, InvalidRequestError):
            found = error_details_pb2.BadRequest.FromString(detail.value).field_violations
            error.violations = tuple(FieldViolation(v.field, v.description) for v in found)
    except DecodeError:
        return  # a broken detail must not hide the error that it belongs to
