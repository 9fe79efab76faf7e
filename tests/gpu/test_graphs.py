"""Captured graphs themselves: memory that padding must not touch, and streams that must not wait for one another."""

from __future__ import annotations

import threading
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
from expertd_server.staging import SlotPool  # noqa: E402

KIND = BatchKind(torch.float8_e4m3fn, False, torch.bfloat16)


def make(backend: CudaBackend, layer: MoELayer, max_rows: int) -> tuple[Graphs, SlotPool]:
    streams = CudaStreams(backend.device)
    pool = SlotPool([CudaSlot(index, streams) for index in range(2)])
    pool.require(*slot_bytes(layer.spec, max_rows, takes_wide=False))
    return Graphs(pool, max_rows, CudaCapturer(streams)), pool


@pytest.mark.parametrize("rows", [1, 8, 64, 128])
def test_a_replay_reads_and_writes_the_tokens_and_nothing_else(backend: CudaBackend, rows: int) -> None:
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
        slot.send(whole(inputs.nbytes(rows)))
        with slot.compute():
            graph.replay()
        slot.fetch(whole(outputs.nbytes(rows)))
        slot.wait()
        output = outputs.output.view(slot.host_out, rows)
        assert expected is not None
        assert same_bits(output[:tokens], expected.cpu()), f"rows {rows}, T {tokens}"
        assert bool((output[tokens:].view(torch.uint8) == 0x55).all()), f"rows {rows}, T {tokens}: padding was written"
        times = slot.times()
        assert min(times.copy_in_s, times.compute_s, times.copy_out_s) >= 0
        pool.give_back(slot)


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
