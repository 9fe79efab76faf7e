"""Requests of front-ends that may share a batch, taken through the engine as one call.

What Python does for a request of a front-end (a call, a place in the queue, a promise, an answer) takes the engine's
one thread longer than all else. Requests that were read together and ask for the same kind of batch are a bundle: one
call, whose members csrc/bundle.cpp looks after. As long as it waits and is the last of its kind, those of the next
reading, of whatever front-end, join it. They keep their own deadlines and can be cancelled one by one until their batch
starts; each has its own answer. What is not plain, or where nothing was compiled, goes one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from expertd_server import spans as span_rules
from expertd_server.compiled import BLOCKS, CODEC
from expertd_server.layer import MoELayer
from expertd_server.layout import NUM_VALID_BYTES, BatchKind, InputLayout, OutputLayout, Part
from expertd_server.native import Copies
from expertd_server.ring import Ring
from expertd_server.spans import PackedSpans, Span
from expertd_server.timing import ForwardTiming

if TYPE_CHECKING:
    from expertd_server._blocks import Bundle

__all__ = ["IS_COMPILED", "BlockPlace", "BundledCalls", "Descriptor", "bundles_of"]

IS_COMPILED = BLOCKS is not None and CODEC is not None

Descriptor = tuple[int, int, int, int]
"""As `Ring.take` returns it: kind, number, offset and nbytes."""

BlockPlace = tuple[Any, int, int, int]
"""Who asks, number of the request, offset and nbytes of its block."""


def bundles_of(  # noqa: PLR0917 (called for every reading, and keywords take time)
    descriptors: list[Descriptor],
    kind: int,
    source: object,
    ring: Ring,
    memory: memoryview,
    regions: dict[int, memoryview],
    most_tokens: int,
    now_s: float,
) -> tuple[list[Bundle], list[Descriptor]]:
    """Those of the plain requests among these descriptors, and the descriptors of all else, in order.

    kind: of the descriptors of requests. source: who asks. ring: of the answers. memory, regions: where blocks and
    tensors lie. most_tokens: of a bundle of more than one request. now_s: from when on they wait. Plain: do_finalize,
    no routing back, float32 logits or bfloat16 weights; whatever cannot be read is left to who reads it alone. Only
    where IS_COMPILED.
    """
    assert BLOCKS is not None, "see IS_COMPILED"
    return BLOCKS.bundles_of(descriptors, kind, source, ring, memory, regions, most_tokens, now_s)


class BundledCalls:
    """A bundle as a call: what `ForwardCall` says of one request, and its share of a batch's way."""

    __slots__ = ("_bundle", "_on_late", "_queue_tokens", "kind", "layer", "num_requests", "num_tokens")

    do_finalize: ClassVar = True
    return_routing: ClassVar = False

    def __init__(
        self,
        layer: MoELayer,
        bundle: Bundle,
        kind: BatchKind,
        on_late: Callable[[BlockPlace, float], object],
        queue_tokens: Callable[[], int],
    ) -> None:
        """kind: what the bundle says of it, in torch's terms. on_late: takes each member whose deadline had passed when
        the batch started, and for how long it had waited. queue_tokens: for answers.
        """
        self._bundle = bundle
        self._on_late = on_late
        self._queue_tokens = queue_tokens
        self.layer = layer
        self.kind = kind
        self.num_tokens = bundle.num_tokens
        self.num_requests = bundle.num_requests

    def begin(self, now_s: float) -> None:
        """Its batch starts: who is late is left out, and nobody joins or can be cancelled any more."""
        late, waited_s = self._bundle.begin(now_s)
        self.count()
        for place, seconds in zip(late, waited_s, strict=True):
            self._on_late(place, seconds)

    def absorb(self, bundle: Bundle, most_tokens: int, most_requests: int) -> tuple[int, int]:
        """Have the first of another's members as well, of the same kind, which that one loses, as many as may be; their
        tokens, and how many they are."""
        num_tokens, num_requests = self.num_tokens, self.num_requests
        self._bundle.absorb(bundle, most_tokens, most_requests)
        self.count()
        return self.num_tokens - num_tokens, self.num_requests - num_requests

    def count(self) -> None:
        """Say how many there are, after members joined or left."""
        self.num_tokens, self.num_requests = self._bundle.num_tokens, self._bundle.num_requests

    def gather(  # noqa: PLR0917 (called for every batch, and keywords take time)
        self, number: int, part: Part, destination: object, start: int, spans: list[Span], copies: Copies
    ) -> int:
        """Have the members' rows written to a slot's memory, [bytes] uint8, from `start` on; returns where they end.

        number: of the part: hidden states are 0, then as `InputLayout.routing` has them. spans: the device's copies,
        see `Spans`; copies: the processor's. Raises ValueError where a member has not as many bytes as its rows.
        """
        least = span_rules.MIN_DIRECT_BYTES
        return self._bundle.gather(number, destination, start, part.row_bytes, least, spans, copies)

    def gather_all(self, destination: object, layout: InputLayout, copies: Copies) -> PackedSpans:
        """Have all of a batch that is this bundle written to a slot's memory, as `gather` does; the device's copies."""
        parts, least = layout.bundled_parts, span_rules.MIN_DIRECT_BYTES
        return self._bundle.gather_all(destination, NUM_VALID_BYTES, parts, least, copies)

    def scatter(self, start: int, row_bytes: int, spans: list[Span]) -> tuple[int, bool]:
        """Have the device copy the members' outputs to where they are wanted, or to the slot's host memory; `start`: in
        the slot. Returns where they end, and whether any goes where it is wanted."""
        return self._bundle.scatter(start, row_bytes, span_rules.MIN_DIRECT_BYTES, spans)

    def scatter_all(self, layout: OutputLayout, num_tokens: int) -> tuple[PackedSpans, bool]:
        """All copies of a batch that is this bundle, and whether any goes where it is wanted, as `scatter` does."""
        output, least = layout.output, span_rules.MIN_DIRECT_BYTES
        ids_end = layout.topk_ids.end(num_tokens)  # they come in any case, for metrics
        return self._bundle.scatter_all(ids_end, output.offset, output.row_bytes, least)

    def answer(
        self, address: int, hidden_size: int, timing: ForwardTiming, weights_version: int, copies: Copies
    ) -> None:
        """Write the answers over the requests. timing: queue_us counts from `begin` on. address: of the members'
        outputs in the slot's host memory, as far as they are there; they are copied, or noted in `copies`."""
        self._bundle.answer(
            copies,
            address,
            hidden_size,
            *timing.numbers,
            weights_version,
            self._queue_tokens(),
        )
