"""Between messages and blocks of shared memory: what `codec` is where another process computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expertd_server.blocks import read_answer, read_timing
from expertd_server.compiled import BLOCKS
from expertd_server.message_memory import answer_behind
from expertd_server.messages import Message, answer_place, check_message
from expertd_server.regions import AnswerPlace
from expertd_server.remote_layer import RemoteLayer
from expertd_server.ring import Block
from expertd_server.store import LayerStore
from expertd_server.wire_answer import join_response, join_stream_response
from expertd_server.wire_check import CheckedRequest

__all__ = ["CHECKS_LOGITS_AGAIN", "RemoteAnswer", "RemoteCall", "typed_call", "write_answer", "write_stream_answer"]

CHECKS_LOGITS_AGAIN = True
"""See `Codec`: `write_call` does, when it copies them."""


@dataclass(slots=True)
class RemoteCall:
    """A checked request to a layer that another process computes."""

    layer: RemoteLayer
    request: CheckedRequest
    encode: Callable[[RemoteAnswer], Any] | None = None
    """What to make of the answer; None: the promise is kept with the RemoteAnswer itself."""
    place: memoryview | None = None
    """Where the output, which is all of the answer and as large, may be written; None: nowhere."""


class RemoteAnswer:
    """An answer as it lies in a block, which is free again when this is gone.

    place: where its output lies instead, if it does.
    """

    __slots__ = ("block", "place", "queue_tokens", "timing", "weights_version")

    def __init__(self, block: Block, place: memoryview | None = None) -> None:
        self.block = block
        self.place = place
        self.timing, self.weights_version, self.queue_tokens = read_timing(block.view)


def typed_call(
    message: Message, store: LayerStore[RemoteLayer], *, max_batch_tokens: int, max_message_bytes: int
) -> RemoteCall:
    """Check everything about a request; see `check_message`."""
    layer, request = check_message(
        message, store, max_batch_tokens=max_batch_tokens, max_message_bytes=max_message_bytes
    )
    return RemoteCall(layer, request, place=answer_place(message, layer.spec.hidden_size, request))


def write_answer(answer: RemoteAnswer, queue_depth_tokens: int) -> bytes:
    """A serialised ForwardResponse."""
    view = answer.block.view
    room = answer_behind(answer.place)
    if room is not None:
        return room.finish(*answer.timing.numbers, queue_depth_tokens, answer.weights_version)
    if BLOCKS is not None and answer.place is None:
        return BLOCKS.encode_answer(view, False, 0, queue_depth_tokens)
    return join_response(read_answer(view, answer.place), answer.timing, queue_depth_tokens, answer.weights_version)


def write_stream_answer(
    request_id: int, answer: RemoteAnswer, queue_depth_tokens: int, place: AnswerPlace | None = None
) -> bytes:
    """A serialised ForwardStreamResponse that holds an answer. place: where its tensors go as far as they fit."""
    view, written = answer.block.view, answer.place
    room = answer_behind(written)
    if room is not None:
        return room.finish(*answer.timing.numbers, queue_depth_tokens, answer.weights_version)
    if BLOCKS is not None and place is None and written is None:
        return BLOCKS.encode_answer(view, True, request_id, queue_depth_tokens)
    if BLOCKS is not None and place is not None and written is not None:
        taken = place.take(len(written))
        assert taken is not None, "it was made for that"
        return BLOCKS.encode_answer(view, True, request_id, queue_depth_tokens, taken[2:])
    tensors, version = read_answer(view, written), answer.weights_version
    return join_stream_response(request_id, tensors, answer.timing, queue_depth_tokens, version, place)
