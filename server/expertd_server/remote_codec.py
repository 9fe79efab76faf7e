"""Between messages and blocks of shared memory: what `codec` is where another process computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expertd_server.blocks import read_answer, read_timing
from expertd_server.compiled import BLOCKS
from expertd_server.messages import Message, check_message
from expertd_server.regions import TENSORS, AnswerPlace
from expertd_server.remote_layer import RemoteLayer
from expertd_server.ring import Block
from expertd_server.store import LayerStore
from expertd_server.wire_answer import join_response, join_stream_response
from expertd_server.wire_check import ITEM_BYTES, CheckedRequest
from expertd_server.wire_parse import RawRequest

__all__ = ["RemoteAnswer", "RemoteCall", "typed_call", "write_answer", "write_stream_answer"]


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
    return RemoteCall(layer, request, place=_place_of(message, layer, request))


def _place_of(message: Message, layer: RemoteLayer, request: CheckedRequest) -> memoryview | None:
    """See `RemoteCall.place`."""
    num_tokens, *_, output_dtype, do_finalize, return_routing = request
    if isinstance(message, RawRequest) or not do_finalize or return_routing:
        return None
    room = message.bound(len(TENSORS))  # the answer_slice, which a stream has found in its regions
    nbytes = num_tokens * layer.spec.hidden_size * ITEM_BYTES[output_dtype]
    return room[:nbytes] if isinstance(room, memoryview) and 0 < nbytes <= len(room) else None


def write_answer(answer: RemoteAnswer, queue_depth_tokens: int) -> bytes:
    """A serialised ForwardResponse."""
    view = answer.block.view
    if BLOCKS is not None and answer.place is None:
        return BLOCKS.encode_answer(view, False, 0, queue_depth_tokens)
    return join_response(read_answer(view, answer.place), answer.timing, queue_depth_tokens, answer.weights_version)


def write_stream_answer(
    request_id: int, answer: RemoteAnswer, queue_depth_tokens: int, place: AnswerPlace | None = None
) -> bytes:
    """A serialised ForwardStreamResponse that holds an answer. place: where its tensors go as far as they fit."""
    view, written = answer.block.view, answer.place
    if BLOCKS is not None and place is None and written is None:
        return BLOCKS.encode_answer(view, True, request_id, queue_depth_tokens)
    if BLOCKS is not None and place is not None and written is not None:
        taken = place.take(len(written))
        assert taken is not None, "it was made for that"
        return BLOCKS.encode_answer(view, True, request_id, queue_depth_tokens, taken[2:])
    tensors, version = read_answer(view, written), answer.weights_version
    return join_stream_response(request_id, tensors, answer.timing, queue_depth_tokens, version, place)
