"""Errors as google.rpc.Status: one code, a message for people, details for programs."""

from __future__ import annotations

import logging
import uuid
from concurrent.futures import CancelledError

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from expertd.v1 import expertd_pb2 as pb
from expertd_server.errors import (
    ExpertdServerError,
    InvalidArgumentError,
    OverloadedError,
    RequestCancelledError,
    UnavailableError,
)

__all__ = ["DOMAIN", "RelayedError", "status_of", "stream_error_of"]

log = logging.getLogger(__name__)

DOMAIN = "expertd"

# gRPC refuses trailing metadata beyond 8 KiB by default. The message is in it twice: percent-encoded, which makes three
# bytes of one that is no printable ASCII, and once more in the details, whose four bytes are three of these.
_MAX_MESSAGE_BYTES = 1024
_MAX_DESCRIPTION_BYTES = 2048


class RelayedError(ExpertdServerError):
    """What went wrong in another process of this server, where it became a status with all its details."""

    def __init__(self, status: status_pb2.Status) -> None:
        self.status = status
        super().__init__(status.message)


def status_of(error: BaseException, request_id: str = "") -> status_pb2.Status:
    """The status to answer with. An error that nobody raised on purpose is logged with an id, and only the id told.

    request_id: for the log line.
    """
    if isinstance(error, RelayedError):
        if error.status.code == code_pb2.INTERNAL:  # the other process knows no request_id
            log.error("request %s failed: %s", request_id or "-", error)
        return error.status
    if isinstance(error, CancelledError):
        error = RequestCancelledError("the caller left before the request was computed")
    if not isinstance(error, ExpertdServerError):
        incident = uuid.uuid4().hex[:12]
        log.error("internal error %s, request %s", incident, request_id or "-", exc_info=error)
        return _status(
            ExpertdServerError.code,
            f"internal error {incident}; the server's log has it under this id",
            [error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"incident": incident})],
        )
    if error.code == "INTERNAL":
        log.error("request %s failed: %s", request_id or "-", error, exc_info=error)
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)]
    if isinstance(error, InvalidArgumentError):
        bad_request = error_details_pb2.BadRequest()
        for violation in error.violations:
            description = _shortened(violation.description, _MAX_DESCRIPTION_BYTES)
            bad_request.field_violations.add(field=violation.field, description=description)
        details.append(bad_request)
    if isinstance(error, OverloadedError | UnavailableError) and error.retry_delay_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_delay_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return _status(error.code, str(error), details)


def stream_error_of(status: status_pb2.Status) -> pb.StreamError:
    """The same status as the answer to one request of a stream."""
    return pb.StreamError(code=status.code, message=status.message, details=status.details)


def _status(code: str, message: str, details: list[Message]) -> status_pb2.Status:
    message = _shortened(message, _MAX_MESSAGE_BYTES)
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code_pb2.Code.Value(code), message=message, details=packed)


def _shortened(text: str, most_bytes: int) -> str:
    """As much of the text as takes so many bytes of UTF-8."""
    if len(text.encode()) <= most_bytes:
        return text
    end = "…".encode()
    return text.encode()[: most_bytes - len(end)].decode(errors="ignore") + end.decode()
