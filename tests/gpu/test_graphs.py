"""Captured graphs themselves: memory that padding must not touch, and streams that must not wait for one another."""

from __future__ import annotations

import os
import select
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from expertd_server.backend_cuda import CudaBackend

pytestmark = pytest.mark.gpu
gpu_layers = pytest.importorskip("gpu_layers", reason="needs the compiled kernels", exc_type=ImportError)

from gpu_layers import make_inputs, prepared, same_bits  # noqa: E402

from expertd_server.cuda_slot import CudaSlot, CudaStreams  # noqa: E402
from expertd_server.graphs import CudaCapturer, Graphs  # noqa: E402
from expertd_server.layer import MoELayer  # noqa: E402
from expertd_server.layout import BatchKind, input_layout, num_valid_tokens, output_layout, slot_bytes  # noqa: E402
from expertd_server.spans import whole  # noqa: E402
from expertd_server.staging import SlotPool, run_in_turn  # noqa: E402

PATIENCE_S = 30.0
KIND = BatchKind(torch.float8_e4m3fn, False, torch.bfloat16)


def make(backend: CudaBackend, layer: MoELayer, max_rows: int) -> tuple[Graphs, SlotPool]:
    streams = CudaStreams(backend.device)
    pool = SlotPool([CudaSlot(index, streams) for index in range(2)])
    pool.require(*slot_bytes(layer.spec, max_rows, takes_wide=False))
    return Graphs(pool, max_rows, CudaCapturer(streams)), pool


@pytest.mark.parametrize("is_started_elsewhere", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 64, 128])
def test_a_replay_reads_and_writes_the_tokens_and_nothing_else(
    backend: CudaBackend, rows: int, is_started_elsewhere: bool
) -> None:
    layer = MoELayer("layer", prepared(backend, 51, max_num_tokens=128), backend)
    graphs, pool = make(backend, layer, 128)
    graphs.capture([layer])
    for tokens in {0, 1, rows // 2, rows - 1, rows}:
        slot = pool.take(0.0)
        graph = graphs.find(slot, layer, KIND, rows)
        assert graph is not None
        hidden_states, logits = make_inputs(layer.spec, rows, 2 * tokens + 1)
        expected = backend.forward(
            layer.prepared, hidden_states[:tokens], routing_logits=logits[:tokens].float()
        ).output
        inputs, outputs = input_layout(layer.spec, KIND, rows), output_layout(layer.spec, KIND, rows)
        slot.host_in.fill_(0x7F)  # NaN
        arguments = inputs.arguments(slot.host_in, rows)
        arguments["hidden_states"][:tokens] = hidden_states[:tokens].cpu()
        arguments["routing_logits"][:tokens] = logits[:tokens].float().cpu()
        num_valid_tokens(slot.host_in).fill_(tokens)
        slot.device_out.fill_(0x55)
        torch.cuda.synchronize()
        sent, fetched = whole(inputs.nbytes(rows)), whole(outputs.nbytes(rows))
        if is_started_elsewhere:
            slot.run(sent, graph, fetched)
        else:
            run_in_turn(slot, sent, graph, fetched)
        slot.wait()
        assert slot.is_computed()
        output = outputs.output.view(slot.host_out, rows)
        assert expected is not None
        assert same_bits(output[:tokens], expected.cpu()), f"rows {rows}, T {tokens}"
        assert bool((output[tokens:].view(torch.uint8) == 0x55).all()), f"rows {rows}, T {tokens}: padding was written"
        times = slot.times()
        assert min(times.copy_in_s, times.compute_s, times.copy_out_s) >= 0
        pool.give_back(slot)


def test_what_is_started_elsewhere_rings_and_what_is_started_here_comes_after_it(backend: CudaBackend) -> None:
    layer = MoELayer("layer", prepared(backend, 53, max_num_tokens=64), backend)
    graphs, pool = make(backend, layer, 64)
    graphs.capture([layer])
    inputs, outputs = input_layout(layer.spec, KIND, 64), output_layout(layer.spec, KIND, 64)
    slots = [pool.take(0.0) for _ in range(2)]
    bells = [os.eventfd(0, os.EFD_CLOEXEC) for _ in slots]
    expected = []
    for number, (slot, bell) in enumerate(zip(slots, bells, strict=True)):
        graph = graphs.find(slot, layer, KIND, 64)
        assert graph is not None
        hidden_states, logits = make_inputs(layer.spec, 64, number)
        expected.append(backend.forward(layer.prepared, hidden_states, routing_logits=logits.float()).output)
        arguments = inputs.arguments(slot.host_in, 64)
        arguments["hidden_states"].copy_(hidden_states)
        arguments["routing_logits"].copy_(logits)
        num_valid_tokens(slot.host_in).fill_(64)
        torch.cuda.synchronize()
        (slot.run if number == 0 else partial(run_in_turn, slot))(
            whole(inputs.nbytes(64)), graph, whole(outputs.nbytes(64))
        )
        slot.ring_when_done(bell)
    num_rung = 0
    while num_rung < 2:  # when it is computed, and when it is over
        assert select.select([bells[1]], [], [], PATIENCE_S)[0]
        num_rung += os.eventfd_read(bells[1])
    assert slots[1].is_done_within(0.0)
    assert slots[0].is_done_within(0.0), "it was first"
    for slot, answer, bell in zip(slots, expected, bells, strict=True):
        assert answer is not None
        assert same_bits(outputs.output.view(slot.host_out, 64), answer.cpu())
        os.close(bell)
        pool.give_back(slot)


def test_what_cannot_be_started_elsewhere_is_told_to_who_waits(backend: CudaBackend) -> None:
    """Its stream is recording a graph meanwhile, which nothing that is no part of it may wait for."""
    layer = MoELayer("layer", prepared(backend, 54, max_num_tokens=8), backend)
    streams = CudaStreams(backend.device)
    pool = SlotPool([CudaSlot(0, streams)])
    pool.require(*slot_bytes(layer.spec, 8, takes_wide=False))
    graphs = Graphs(pool, 8, CudaCapturer(streams))
    graphs.capture([layer])
    slot = pool.take(0.0)
    graph = graphs.find(slot, layer, KIND, 8)
    assert graph is not None
    spans = whole(input_layout(layer.spec, KIND, 8).nbytes(8)), whole(output_layout(layer.spec, KIND, 8).nbytes(8))
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.stream(streams.compute):
        recording.capture_begin(capture_error_mode="relaxed")
        slot.run(spans[0], graph, spans[1])
        bell = os.eventfd(0, os.EFD_CLOEXEC)
        slot.ring_when_done(bell)
        assert select.select([bell], [], [], PATIENCE_S)[0]
        for ask in (slot.wait, partial(slot.is_done_within, 1.0), slot.is_computed):
            with pytest.raises(RuntimeError, match="CUDA"):
                ask()
        with pytest.raises(RuntimeError):  # the recording has suffered
            recording.capture_end()
    os.close(bell)
    num_valid_tokens(slot.host_in).fill_(8)
    slot.run(spans[0], graph, spans[1])
    slot.wait()


def test_capturing_beside_replays_changes_neither(backend: CudaBackend) -> None:
    layers = [MoELayer(f"layer{n}", prepared(backend, 52 + n, max_num_tokens=64), backend) for n in range(6)]
    graphs, pool = make(backend, layers[0], 64)
    graphs.capture(layers[:1])
    slot = pool.take(0.0)
    graph = graphs.find(slot, layers[0], KIND, 64)
    assert graph is not None
    hidden_states, logits = make_inputs(layers[0].spec, 64, 2)
    expected = backend.forward(layers[0].prepared, hidden_states, routing_logits=logits).output
    arguments = input_layout(layers[0].spec, KIND, 64).arguments(slot.host_in, 64)
    arguments["hidden_states"].copy_(hidden_states)
    arguments["routing_logits"].copy_(logits)
    num_valid_tokens(slot.host_in).fill_(64)
    torch.cuda.synchronize()
    pool.slots = tuple(other for other in pool.slots if other is not slot)  # capture on the others
    capturing = threading.Thread(target=graphs.capture, args=(layers[1:],))
    capturing.start()
    rounds = 0
    while capturing.is_alive() or not rounds:
        slot.device_out.fill_(0x55)
        torch.cuda.current_stream().synchronize()
        slot.send(whole(slot.host_in.numel()))
        with slot.compute():
            graph.replay()
        slot.fetch(whole(slot.host_out.numel()))
        slot.wait()
        output = output_layout(layers[0].spec, KIND, 64).output.view(slot.host_out, 64)
        assert expected is not None
        assert same_bits(output, expected.cpu()), f"round {rounds}"
        rounds += 1
    capturing.join(60.0)
    assert len(graphs) == graphs.count_usual(layers), "not all graphs of the new layers were captured"
