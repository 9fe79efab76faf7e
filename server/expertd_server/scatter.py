"""A batch's output goes to the host: into the slot's memory, or by the device straight to where an answer is wanted."""

from __future__ import annotations

from collections.abc import Sequence

from expertd_server.bundle import BundledCalls
from expertd_server.forward import ForwardCall
from expertd_server.layout import OutputLayout
from expertd_server.spans import PackedSpans, Span, Spans, direct_address

__all__ = ["scatter"]


def scatter(
    layout: OutputLayout, calls: Sequence[ForwardCall | BundledCalls], num_tokens: int, *, wants_routing: bool
) -> tuple[list[Span] | PackedSpans, list[int]]:
    """The copies that bring a batch's output to the host, and for each call the address where they put its rows.

    0: in the slot's host memory; of a bundle, whether they put any elsewhere. num_tokens: of all calls. wants_routing:
    whether any call does.
    """
    only = calls[0] if len(calls) == 1 else None
    if isinstance(only, BundledCalls):
        packed, is_any_elsewhere = only.scatter_all(layout, num_tokens)
        return packed, [int(is_any_elsewhere)]
    # NOTE: the ids come in any case, for metrics.
    spans = Spans((layout.expert_weights if wants_routing else layout.topk_ids).end(num_tokens))
    places = []
    start, row_bytes = layout.output.offset, layout.output.row_bytes
    for call in calls:
        if isinstance(call, BundledCalls):
            start, is_any_elsewhere = call.scatter(start, row_bytes, spans.copies)
            places.append(int(is_any_elsewhere))
            continue
        nbytes = call.hidden_states.shape[0] * row_bytes
        place = _place_of(call, nbytes)
        if place:
            spans.add_direct(start, nbytes, place)
        else:
            spans.add(start, nbytes)
        places.append(place)
        start += nbytes
    return spans.copies, places


def _place_of(call: ForwardCall, nbytes: int) -> int:
    """Where a call's rows may go at once; 0: they may not."""
    place = call.place
    if place is None or call.encode is None or nbytes > len(place) or call.return_routing:
        return 0
    return direct_address(place, nbytes)
