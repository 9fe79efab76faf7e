"""Bytes to requests, and requests to checked ones: the compiled codec where it was built and knows them.

Whatever else comes goes the way of `wire_parse` and `wire_check`, which specify it and say what is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, TypeVar

from expertd_server.compiled import CODEC
from expertd_server.message_memory import make_answer
from expertd_server.regions import TENSORS
from expertd_server.store import HeldLayer, LayerStore
from expertd_server.wire_check import ITEM_BYTES, CheckedRequest, check_request
from expertd_server.wire_parse import RawRequest, RawStreamRequest, parse_request, parse_stream_request

if TYPE_CHECKING:
    from expertd_server._codec import Request

__all__ = ["Message", "answer_place", "check_message", "read_message", "read_stream_message"]

L = TypeVar("L", bound=HeldLayer)

Message: TypeAlias = "RawRequest | Request"
"""A ForwardRequest, unchecked."""


def read_message(data: bytes) -> Message:
    """Parse a ForwardRequest. Raises InvalidArgumentError on bytes that are none."""
    if CODEC is not None and (request := CODEC.parse_request(data)) is not None:
        return request
    return parse_request(data)


def read_stream_message(data: bytes) -> tuple[int, int, int, Message | RawStreamRequest | None]:
    """The id, timeout_ms, rows of hidden_states and request of a ForwardStreamRequest.

    In place of the request, the whole of a message that says something about regions. Raises InvalidArgumentError on
    bytes that are none.
    """
    if CODEC is not None and (request := CODEC.parse_stream_request(data)) is not None:
        return request.id, request.timeout_ms, request.num_tokens, request
    raw = parse_stream_request(data)
    return raw.id, raw.timeout_ms, raw.num_tokens, raw if raw.is_about_regions else raw.request


def check_message(
    message: Message, store: LayerStore[L], *, max_batch_tokens: int, max_message_bytes: int
) -> tuple[L, CheckedRequest]:
    """Check everything about a request; see `check_request`, which knows what to tell where something is wrong."""
    if not isinstance(message, RawRequest):
        layer = store.get(message.layer, message.weights_version or None)
        spec = layer.spec
        takes_wide = layer.hidden_states_scale is not None
        good = message.check(
            spec.hidden_size, spec.num_experts, spec.top_k, takes_wide, max_batch_tokens, max_message_bytes
        )
        if good is not None:
            return layer, good
        message = _reread(message)
    return check_request(message, store, max_batch_tokens=max_batch_tokens, max_message_bytes=max_message_bytes)


def answer_place(message: Message, hidden_size: int, request: CheckedRequest) -> memoryview | None:
    """Where the output of a checked request may be written, which is all of its answer and as large; None: nowhere.

    In the caller's memory, if that is where it wants the answer; else in the message that will hold it, where there is
    room for that.
    """
    num_tokens, *_, output_dtype, do_finalize, return_routing = request
    if isinstance(message, RawRequest) or not do_finalize or return_routing:
        return None
    room = message.bound(len(TENSORS))  # the answer_slice, which a stream has found in its regions
    if room is None:
        return make_answer(message.is_stream, message.id, output_dtype, num_tokens, hidden_size)
    nbytes = num_tokens * hidden_size * ITEM_BYTES[output_dtype]
    return room[:nbytes] if isinstance(room, memoryview) and 0 < nbytes <= len(room) else None


def _reread(message: Request) -> RawRequest:
    """What Python reads from the bytes of a request that the compiled codec has read."""
    if not message.is_stream:
        return parse_request(message.data)
    request = parse_stream_request(message.data).request
    assert request is not None, "else it were no Request"
    for number, name in enumerate(TENSORS):
        data = message.bound(number)  # what the stream has found in the slice
        if data is not None:
            tensor = getattr(request, name)
            tensor.data, tensor.is_resolved = data, True
    if message.bound(len(TENSORS)) is not None:
        request.answer_slice = None
    return request
