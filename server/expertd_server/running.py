"""A batch on its way: waits for the backend, then hands every request its own rows, in its own output type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from expertd_server.backend import MoEOutput
from expertd_server.batch import Batch
from expertd_server.bundle import BundledCalls
from expertd_server.errors import BackendError, ExpertdServerError
from expertd_server.forward import ForwardCall, ForwardResult, Matrix
from expertd_server.layer import MoELayer
from expertd_server.native import Copies
from expertd_server.staging import Slot, SlotPool
from expertd_server.timing import ForwardTiming

__all__ = ["BatchReport", "RunningBatch", "unexpected"]


@dataclass(slots=True)
class BatchReport:
    """What one batch did, for metrics."""

    layer: MoELayer
    num_requests: int
    num_tokens: int
    graph_rows: int | None
    """Rows of the graph that was replayed, padding included; None: it ran without one."""
    compute_s: float
    """How long it had the device to itself."""
    topk_ids: torch.Tensor | npt.NDArray[np.int16]
    """[T, K] int32 or int16 on the host, the experts that were selected; valid during the call alone."""


class HostOutput(NamedTuple):
    """A batch's outputs on the host, and what is asked of them for every batch: torch takes long to say it."""

    tensors: MoEOutput
    output_at: Matrix | None
    """Where its output lies, if it has one and that is dense."""
    topk_ids: torch.Tensor | npt.NDArray[np.int16]
    """Those of the tensors."""


class _BundleRows(NamedTuple):
    """A bundle's share of a batch's answer."""

    timing: ForwardTiming
    rows: Matrix
    """Those of its members, as far as they lie in the slot."""


@dataclass(eq=False, slots=True)
class RunningBatch:
    """A batch that was launched, see `batch.Running`."""

    batch: Batch[ForwardCall | BundledCalls, Any]
    layer: MoELayer
    slots: SlotPool
    """Where the slot goes back to."""
    slot: Slot
    calls: list[ForwardCall | BundledCalls]
    """Of the batch's entries. Kept to the end, whatever becomes of those: the device may use their memory till then."""
    num_tokens: int
    """Of the calls."""
    places: list[int]
    """Where the device puts each call's output, see `scatter`; empty where the answer does not lie in the slot."""
    in_slot: HostOutput | None
    """The outputs as they lie in the slot's host memory, padding included."""
    answer: MoEOutput | None
    """None where the answer is `in_slot`."""
    gather_s: float
    """What the host took until the copy in was started."""
    graph_rows: int | None
    clock: Callable[[], float]
    on_batch: Callable[[BatchReport], None] | None
    """Called by `close` with what the batch did, where it has results."""
    compute_s: float = 0.0
    topk_ids: torch.Tensor | npt.NDArray[np.int16] | None = None
    """As in `BatchReport`; None where the batch has no results."""
    parts: list[ForwardResult | _BundleRows] | None = None
    """The calls' shares of the answer; None: not made yet."""
    copies: Copies | None = None
    """Where the parts note what is to be copied; see `ForwardResult`."""

    @property
    def num_requests(self) -> int:
        """Of the calls."""
        return sum([call.num_requests for call in self.calls])

    def wait(self, seconds: float | None = None) -> bool:
        try:
            if self.parts is None and self.in_slot is not None and self._may_be_taken_apart:
                self.parts = self._take_apart(self.in_slot)  # while the device computes
            if seconds is not None:
                return self.slot.is_done_within(seconds)
            self.slot.wait()
        except ExpertdServerError:
            raise
        except Exception as error:
            raise unexpected(error, self.layer, self.num_tokens) from error
        return True

    def is_computed(self) -> bool:
        return self.slot.is_computed()

    def ring_when_over(self, fd: int) -> None:
        self.slot.ring_when_done(fd)

    def results(self) -> list[Any]:
        try:
            return self._split()
        except ExpertdServerError:
            raise
        except Exception as error:
            raise unexpected(error, self.layer, self.num_tokens) from error

    def close(self) -> None:
        try:
            if self.topk_ids is not None and self.on_batch is not None:
                self.on_batch(
                    BatchReport(
                        self.layer,
                        self.num_requests,
                        self.num_tokens,
                        self.graph_rows,
                        self.compute_s,
                        self.topk_ids,
                    )
                )
        finally:
            self.slots.give_back(self.slot)

    def _answer_bundle(self, call: BundledCalls) -> list[Any]:
        """As `_split`, where the batch is one bundle, in the shortest way."""
        start_s = self.clock()
        assert self.in_slot is not None
        assert self.in_slot.output_at is not None
        copy_in_s, wait_s, self.compute_s, copy_out_s = self.slot.times()
        num_tokens, output = self.num_tokens, self.in_slot.output_at
        self.topk_ids = self.in_slot.topk_ids[:num_tokens]
        timing = ForwardTiming(
            round(wait_s * 1e6),
            round((self.gather_s + copy_in_s) * 1e6),
            round(self.compute_s * 1e6),
            round((copy_out_s + self.clock() - start_s) * 1e6),
            num_tokens,
            call.num_requests,
        )
        copies = Copies()
        call.answer(output.address, output.num_columns, timing, self.layer.weights_version, copies)
        copies.run()
        return [None]

    def _split(self) -> list[Any]:
        only = self.calls[0] if len(self.calls) == 1 else None
        if isinstance(only, BundledCalls):
            return self._answer_bundle(only)
        clock = self.clock
        start_s = clock()
        copy_in_s, wait_s, compute_s, copy_out_s = self.slot.times()
        whole = self._host_answer()
        parts = self.parts if self.parts is not None else self._take_apart(whole)
        is_padded = self.graph_rows is not None and self.graph_rows != self.num_tokens
        self.compute_s = compute_s
        self.topk_ids = whole.topk_ids[: self.num_tokens] if is_padded else whole.topk_ids
        copy_in_us, compute_us = round((self.gather_s + copy_in_s) * 1e6), round(compute_s * 1e6)
        copy_out_us = round((copy_out_s + clock() - start_s) * 1e6)
        # Last, and then nothing may go wrong any more: the batch must not run again, because answers may have been
        # written over what they were computed from.
        answers: list[Any] = []
        for entry, call, each in zip(self.batch.entries, self.calls, parts, strict=True):
            timing = each.timing
            # A bundle knows since when each of its members waits.
            queued_s = 0.0 if isinstance(call, BundledCalls) else entry.queued_s
            timing.queue_us = round((queued_s + wait_s) * 1e6)
            timing.copy_in_us, timing.compute_us, timing.copy_out_us = copy_in_us, compute_us, copy_out_us
            try:
                if isinstance(each, _BundleRows):
                    assert isinstance(call, BundledCalls)
                    assert self.copies is not None
                    version = self.layer.weights_version
                    call.answer(each.rows.address, each.rows.num_columns, timing, version, self.copies)
                    answers.append(None)
                else:
                    assert isinstance(call, ForwardCall)
                    answers.append(each if call.encode is None else call.encode(each))
            except Exception as error:  # its own alone
                answers.append(error)
        if self.copies is not None:
            self.copies.run()  # from what the parts hold
        return answers

    @property
    def _may_be_taken_apart(self) -> bool:
        """Whether all that the parts say is where something will be, once it is computed."""
        calls = self.calls
        is_bundle = len(calls) == 1 and isinstance(calls[0], BundledCalls)  # which has a shorter way
        return (
            not is_bundle
            and self.answer is None
            and all(
                isinstance(call, BundledCalls) or not (call.encode is None or call.return_routing) for call in calls
            )
        )

    def _take_apart(self, whole: HostOutput) -> list[ForwardResult | _BundleRows]:
        """The calls' shares of the answer; their timing says in what company they ran, and no times yet."""
        num_tokens, num_requests, version = self.num_tokens, self.num_requests, self.layer.weights_version
        is_padded = self.graph_rows is not None and self.graph_rows != num_tokens
        is_alone = len(self.calls) == 1
        self.copies = None if is_alone and isinstance(self.calls[0], ForwardCall) else Copies()  # see gather
        parts: list[ForwardResult | _BundleRows] = []
        first = 0
        for number, call in enumerate(self.calls):
            timing = ForwardTiming(0, 0, 0, 0, num_tokens, num_requests)
            if isinstance(call, BundledCalls):
                assert whole.output_at is not None
                parts.append(_BundleRows(timing, whole.output_at.rows(first, call.num_tokens)))
            else:
                part = ForwardResult(version, timing, copies=self.copies)
                place = self.places[number] if self.places else 0
                self._place_output(part, call, whole, first, place, is_whole=is_alone and not is_padded)
                if call.return_routing or not call.do_finalize:
                    self._fill(part, call, whole.tensors, first)
                parts.append(part)
            first += call.num_tokens
        return parts

    def _place_output(
        self, part: ForwardResult, call: ForwardCall, whole: HostOutput, first: int, place: int, *, is_whole: bool
    ) -> None:
        """Say where one call's output is. place: see `places`; is_whole: whether the batch's output is all its own."""
        output = whole.tensors.output
        if place:
            assert whole.output_at is not None
            assert call.place is not None
            at = Matrix(whole.output_at.dtype, call.num_tokens, whole.output_at.num_columns, place)
            part.lies_at(at, call.place)
        elif output is not None and (call.encode is None or call.output_dtype != output.dtype):
            # In memory of its own: a slow reader must not hold the whole batch's output.
            rows = output if is_whole else output[first : first + call.num_tokens]
            part.output = _own(rows, call.output_dtype, is_owned=len(self.calls) == 1 and self.answer is not None)
        elif output is not None:
            part.lies_in(output, whole.output_at, first, call.num_tokens)

    def _fill(self, part: ForwardResult, call: ForwardCall, answer: MoEOutput, first: int) -> None:
        """Set the tensors of one call's answer but its output. first: where the call's rows begin."""
        mine = slice(first, first + call.num_tokens)
        if answer.expanded_idx_to_permuted_idx is not None:
            assert answer.gemm2_output is not None
            slots = answer.expanded_idx_to_permuted_idx.view(-1, self.layer.spec.top_k)
            part.gemm2_output, part.expanded_idx_to_permuted_idx = _own_rows(
                answer.gemm2_output, slots[mine], answer.topk_ids[mine]
            )
        if call.return_routing or not call.do_finalize:
            part.expert_weights = answer.expert_weights[mine].clone()
        if call.return_routing:
            part.topk_ids = answer.topk_ids[mine].to(torch.int32, copy=True)

    def _host_answer(self) -> HostOutput:
        """The whole batch's answer, brought to the host; padding may follow it."""
        slot, answer = self.slot, self.answer
        if answer is None:
            assert self.in_slot is not None
            return self.in_slot
        if not slot.is_host:
            tensors = {name: None if tensor is None else slot.read(tensor) for name, tensor in vars(answer).items()}
            answer = MoEOutput(**tensors)  # type: ignore[arg-type]
        return HostOutput(answer, None if answer.output is None else Matrix.of(answer.output), answer.topk_ids)


def unexpected(error: Exception, layer: MoELayer, num_tokens: int) -> BackendError:
    """What to raise from an error that nobody foresaw, so that it says which batch it met."""
    return BackendError(
        f"layer {layer.name!r}: the {layer.backend.name} backend failed on {num_tokens} tokens: "
        f"{type(error).__name__}: {error}"
    )


def _own(rows: torch.Tensor, dtype: torch.dtype, *, is_owned: bool) -> torch.Tensor:
    """The rows in memory of their own: a slow reader must not hold the whole batch's output."""
    if rows.dtype != dtype:
        return rows.to(dtype)
    return rows if is_owned else rows.clone()


def _own_rows(
    gemm2_output: torch.Tensor, rows: torch.Tensor, topk_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call's share of the unfinalised output: its rows by expert, then by slot, and where each slot's row went.

    gemm2_output [P, H] of the batch; rows [T, K] int32 into it, -1: none; topk_ids [T, K].
    """
    flat_rows, flat_ids = rows.reshape(-1), topk_ids.reshape(-1)
    held = (flat_rows >= 0).nonzero().view(-1)
    # The order is ours, not the batch's, so that the answer's bytes do not depend on the company.
    order = held[torch.sort(flat_ids[held], stable=True).indices]
    expanded = torch.full_like(flat_rows, -1)
    expanded[order] = torch.arange(order.numel(), dtype=expanded.dtype)
    return gemm2_output[flat_rows[order].long()], expanded
