"""Bytes to checked calls, and answers to bytes: the fast way where there is one.

The compiled module knows requests that are as they should be, and answers that are one matrix, both with their tensors
in the message or in shared memory. Whatever else comes, every request with something wrong to be told included, goes
the way of `wire_parse` and `wire`, which are the specification: tests hold the two equal.
"""

from __future__ import annotations

from expertd_server.compiled import CODEC
from expertd_server.forward import ForwardCall, ForwardResult, Matrix
from expertd_server.layer import MoELayer
from expertd_server.message_memory import answer_behind
from expertd_server.messages import Message, answer_place, check_message, read_message, read_stream_message
from expertd_server.regions import AnswerPlace
from expertd_server.store import LayerStore
from expertd_server.wire import WIRE_DTYPES, call_of, encode_response, encode_stream_response

__all__ = ["Message", "read_message", "read_stream_message", "typed_call"]
__all__ += ["CHECKS_LOGITS_AGAIN", "write_answer", "write_stream_answer"]

CHECKS_LOGITS_AGAIN = False
"""See `Codec`: the device may read them where they are."""


def typed_call(
    message: Message, store: LayerStore[MoELayer], *, max_batch_tokens: int, max_message_bytes: int
) -> ForwardCall:
    """Check everything about a request, and type it; see `check_message`."""
    layer, request = check_message(
        message, store, max_batch_tokens=max_batch_tokens, max_message_bytes=max_message_bytes
    )
    call = call_of(layer, request)
    call.place = answer_place(message, layer.spec.hidden_size, request)
    return call


def write_answer(result: ForwardResult, queue_depth_tokens: int) -> bytes:
    """A serialised ForwardResponse."""
    matrix = result.matrix
    if CODEC is None or matrix is None:
        return encode_response(result, queue_depth_tokens)
    return _write(False, 0, result, matrix, queue_depth_tokens)


def write_stream_answer(
    request_id: int, result: ForwardResult, queue_depth_tokens: int, place: AnswerPlace | None = None
) -> bytes:
    """A serialised ForwardStreamResponse that holds an answer. place: where its tensors go as far as they fit."""
    matrix = result.matrix
    if CODEC is None or matrix is None:
        return encode_stream_response(request_id, result, queue_depth_tokens, place)
    return _write(True, request_id, result, matrix, queue_depth_tokens, place)


def _write(  # noqa: PLR0917 (called for every request, and keywords take time)
    is_stream: bool,
    request_id: int,
    result: ForwardResult,
    matrix: Matrix,
    queue_depth_tokens: int,
    place: AnswerPlace | None = None,
) -> bytes:
    timing = result.timing
    answer = answer_behind(result.place)
    if answer is not None:
        return answer.finish(*timing.numbers, queue_depth_tokens, result.weights_version)
    dtype, num_tokens, hidden_size, address = matrix
    return CODEC.encode_response(
        is_stream,
        request_id,
        WIRE_DTYPES[dtype],
        num_tokens,
        hidden_size,
        address,
        *timing.numbers,
        queue_depth_tokens,
        result.weights_version,
        result.copies,
        place.take(matrix.nbytes) if place is not None and matrix.nbytes else None,
    )
