"""From a gRPC status to an exception."""

from __future__ import annotations

import asyncio
import pickle

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

import expertd
from expertd import errors

EXPECTED = {
    "OK": expertd.ProtocolError,
    "CANCELLED": expertd.CancelledError,
    "UNKNOWN": expertd.ServerError,
    "INVALID_ARGUMENT": expertd.InvalidRequestError,
    "DEADLINE_EXCEEDED": expertd.TimeoutError,
    "NOT_FOUND": expertd.LayerNotFoundError,
    "ALREADY_EXISTS": expertd.ServerError,
    "PERMISSION_DENIED": expertd.AccessDeniedError,
    "UNAUTHENTICATED": expertd.AccessDeniedError,
    "RESOURCE_EXHAUSTED": expertd.OverloadedError,
    "FAILED_PRECONDITION": expertd.VersionNotHeldError,
    "ABORTED": expertd.ServerError,
    "OUT_OF_RANGE": expertd.InvalidRequestError,
    "UNIMPLEMENTED": expertd.ProtocolError,
    "INTERNAL": expertd.ServerError,
    "UNAVAILABLE": expertd.UnavailableError,
    "DATA_LOSS": expertd.ServerError,
}


def packed(*messages: Message) -> list[AnyMessage]:
    details = []
    for message in messages:
        detail = AnyMessage()
        detail.Pack(message)
        details.append(detail)
    return details


@pytest.mark.parametrize("code", list(grpc.StatusCode), ids=lambda code: code.name)
def test_every_status_code_is_mapped(code: grpc.StatusCode) -> None:
    # Cancelled by the service, that is: see the next test.
    details = packed(error_details_pb2.ErrorInfo(reason=code.name)) if code is grpc.StatusCode.CANCELLED else ()
    error = errors.error_from_status(code, "why", details)
    assert type(error) is EXPECTED[code.name]
    assert error.code is code
    assert str(error) == "why"
    assert error.retryable == (code.name in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"))


def test_what_grpc_itself_cancelled_is_sent_again() -> None:
    error = errors.error_from_status(grpc.StatusCode.CANCELLED, "CANCELLED")
    assert type(error) is expertd.UnavailableError
    assert error.code is grpc.StatusCode.CANCELLED
    assert error.retryable


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("WEIGHTS_VERSION_NOT_HELD", expertd.VersionNotHeldError),
        ("VERSION_CONFLICT", expertd.OrderRefusedError),
        ("BAD_CHECKPOINT", expertd.OrderRefusedError),
        ("INSUFFICIENT_MEMORY", expertd.OrderRefusedError),
        ("OF_A_LATER_SERVER", expertd.VersionNotHeldError),
    ],
)
def test_a_code_that_stands_for_several_things_is_told_apart_by_the_reason(
    reason: str, kind: type[expertd.ExpertdError]
) -> None:
    info = error_details_pb2.ErrorInfo(reason=reason, metadata={"needed_bytes": "12", "free_bytes": "many"})
    error = errors.error_from_status(grpc.StatusCode.FAILED_PRECONDITION, "why", packed(info))
    assert type(error) is kind
    assert (error.reason, error.retryable) == (reason, False)
    if isinstance(error, expertd.OrderRefusedError):
        assert (error.needed_bytes, error.free_bytes) == (12, None)


def test_number_that_grpc_does_not_define_is_unknown() -> None:
    assert errors.code_from_number(8) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert errors.code_from_number(99) is grpc.StatusCode.UNKNOWN


def test_details_fill_reason_violations_and_retry_delay() -> None:
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="hidden_states.shape", description="has 3 columns, expected 4")
    info = error_details_pb2.ErrorInfo(reason="SOME_REASON", domain="expertd")
    error = errors.error_from_status(grpc.StatusCode.INVALID_ARGUMENT, "no", packed(info, bad))
    assert isinstance(error, expertd.InvalidRequestError)
    assert error.reason == "SOME_REASON"
    assert error.violations == (expertd.FieldViolation("hidden_states.shape", "has 3 columns, expected 4"),)

    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    full = errors.error_from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", packed(retry))
    assert isinstance(full, expertd.OverloadedError)
    assert full.retry_after_s == 1.5


def test_unknown_and_broken_details_do_not_hide_the_error() -> None:
    broken = AnyMessage(type_url="type.googleapis.com/google.rpc.BadRequest", value=b"\xff\xff")
    foreign = AnyMessage(type_url="type.googleapis.com/not.Known", value=b"abc")
    error = errors.error_from_status(grpc.StatusCode.INVALID_ARGUMENT, "no", [broken, foreign])
    assert isinstance(error, expertd.InvalidRequestError)
    assert error.violations == ()


def test_details_come_from_the_trailing_metadata() -> None:
    info = error_details_pb2.ErrorInfo(reason="QUEUE_FULL")
    status = status_pb2.Status(code=8, message="full", details=packed(info))
    trailers: list[tuple[str, str | bytes]] = [("a", "b"), ("grpc-status-details-bin", status.SerializeToString())]
    error = errors.error_from_trailers(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", trailers, request_id="r1")
    assert (error.reason, error.request_id) == ("QUEUE_FULL", "r1")
    unreadable: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", b"\xff")]
    assert str(errors.error_from_trailers(grpc.StatusCode.INTERNAL, "boom", unreadable)) == "boom"


def test_message_over_the_limit_is_not_an_overload() -> None:
    text = "CLIENT: Received message larger than max (5000000 vs. 4194304)"
    error = errors.error_from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
    assert isinstance(error, expertd.MessageTooLargeError)
    assert not error.retryable
    assert "max_message_bytes" in str(error)


@pytest.mark.parametrize("code", ["CANCELLED", "UNKNOWN", "INTERNAL", "DEADLINE_EXCEEDED", "UNAVAILABLE"])
def test_broken_stream_makes_its_requests_retryable(code: str) -> None:
    broken = errors.stream_broken(errors.error_from_status(grpc.StatusCode[code], "rst"))
    assert isinstance(broken, expertd.UnavailableError)
    assert broken.retryable


@pytest.mark.parametrize("code", ["UNIMPLEMENTED", "UNAUTHENTICATED", "PERMISSION_DENIED"])
def test_stream_that_can_never_work_is_not_retried(code: str) -> None:
    end = errors.error_from_status(grpc.StatusCode[code], "no")
    assert errors.stream_broken(end) is end


def test_errors_are_also_the_built_in_ones_but_never_asyncio_cancellation() -> None:
    assert issubclass(expertd.TimeoutError, TimeoutError)
    assert issubclass(expertd.InvalidRequestError, ValueError)
    assert issubclass(expertd.LayerNotFoundError, LookupError)
    assert issubclass(expertd.UnavailableError, ConnectionError)
    for name in errors.__all__:
        kind = getattr(errors, name)
        if name != "FieldViolation":
            assert issubclass(kind, expertd.ExpertdError), name
            assert not issubclass(kind, asyncio.CancelledError), name


def test_the_docstring_draws_every_class() -> None:
    assert errors.__doc__ is not None
    for name in errors.__all__:
        assert name in errors.__doc__ or name == "FieldViolation", name


def test_errors_survive_pickling() -> None:
    error = expertd.InvalidRequestError.of("layer", "is 3, expected a name")
    error.request_id = "r"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (expertd.InvalidRequestError, "layer: is 3, expected a name")
    assert (again.violations, again.request_id) == (error.violations, "r")
