"""The engine on a GPU: answers of captured batches are the operator's own, to the bit, whoever shares them."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from engine_calls import check, make_call
from shared_calls import SharedMemory, by_bytes, everything

from expertd.v1 import expertd_pb2 as pb
from expertd_server import spans
from expertd_server.batch import Limits
from expertd_server.cuda_slot import pinner_of
from expertd_server.engine import Engine, ForwardCall, HostTensor
from expertd_server.event_loop import EventLoop
from expertd_server.layer import MoELayer
from expertd_server.pinning import PIECE_BYTES, Pinner
from expertd_server.synthetic import synthetic_layers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expertd_server.backend_cuda import CudaBackend

pytestmark = pytest.mark.gpu

MAX_BATCH_TOKENS = 256
MAX_GRAPH_TOKENS = 128
NUM_CLIENTS = 8
ROUNDS = 25
PATIENCE_S = 60.0


def host(tensor: torch.Tensor) -> HostTensor:
    return HostTensor(tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.fixture(params=["in threads", "in one thread"])
def served(shared_backend: CudaBackend, request: pytest.FixtureRequest) -> Iterator[tuple[Engine, list[MoELayer]]]:
    layers = [
        MoELayer(name, shared_backend.prepare(spec, weights.to("cuda")), shared_backend)
        for name, spec, weights in synthetic_layers("tiny", 2)
    ]
    limits = Limits(max_batch_tokens=MAX_BATCH_TOKENS, max_queue_tokens=1 << 20, max_queue_requests=1 << 16)
    engine = Engine(limits, shared_backend, max_graph_tokens=MAX_GRAPH_TOKENS)
    engine.capture(layers)
    assert engine.graphs is not None
    assert len(engine.graphs) > 0
    loop = EventLoop.acquire()
    engine.batcher.start(loop if request.param == "in one thread" else None)
    yield engine, layers
    assert engine.batcher.stop(PATIENCE_S)
    loop.release()


@pytest.fixture
def pinner(shared_backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pinner]:
    """Whose memory is used for tensors of any size."""
    monkeypatch.setattr(spans, "MIN_DIRECT_BYTES", 1)
    pinner = pinner_of(shared_backend.device, 1 << 28)
    assert pinner is not None
    yield pinner
    pinner.close()


def test_answers_of_shared_batches_equal_the_operator_alone(served: tuple[Engine, list[MoELayer]]) -> None:
    engine, layers = served
    shared: list[int] = []

    def client(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        choose = random.Random(seed)
        for round_number in range(ROUNDS):
            layer = choose.choice(layers)
            num_tokens = choose.choice((1, 2, 3, 7, 16, 33, 64, 100, 200))
            hidden = torch.randn(num_tokens, layer.spec.hidden_size, generator=generator).to(torch.bfloat16)
            if choose.random() < 0.5:
                hidden = hidden.to(torch.float8_e4m3fn)
            logits = torch.randn(num_tokens, layer.spec.num_experts, generator=generator)
            dtype = choose.choice((torch.bfloat16, torch.float32))
            call = ForwardCall(layer, host(hidden), routing_logits=host(logits), output_dtype=dtype)
            answer = engine.submit(call).result(PATIENCE_S)
            assert answer.output is not None
            shared.append(answer.timing.batch_requests)
            kept[seed, round_number] = (layer, hidden, logits, dtype, answer.output)

    kept: dict[tuple[int, int], tuple[MoELayer, torch.Tensor, torch.Tensor, torch.dtype, torch.Tensor]] = {}
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        list(pool.map(client, range(NUM_CLIENTS)))
    for where, (layer, hidden, logits, dtype, output) in kept.items():
        lone = layer.forward(hidden.cuda(), routing_logits=logits.cuda(), output_dtype=dtype).output
        assert lone is not None
        assert torch.equal(lone.cpu().view(torch.uint8), output.view(torch.uint8)), (where, hidden.shape, dtype)
    assert max(shared) > 1, "no two requests ever shared a batch"


def test_every_graph_bucket_gives_the_operators_bits(served: tuple[Engine, list[MoELayer]]) -> None:
    engine, layers = served
    generator = torch.Generator().manual_seed(7)
    layer = layers[0]
    for num_tokens in (1, 2, 3, 4, 5, 8, 9, 16, 31, 32, 64, 65, 127, 128, 129):
        hidden = torch.randn(num_tokens, layer.spec.hidden_size, generator=generator).to(torch.bfloat16)
        ids = torch.randint(0, layer.spec.num_experts, (num_tokens, layer.spec.top_k), generator=generator)
        weights = torch.rand(num_tokens, layer.spec.top_k, generator=generator).to(torch.bfloat16)
        call = ForwardCall(layer, host(hidden), topk_ids=host(ids.int()), topk_weights=host(weights))
        answer = engine.submit(call).result(PATIENCE_S)
        lone = layer.forward(hidden.cuda(), topk_ids=ids.int().cuda(), topk_weights=weights.cuda()).output
        assert answer.output is not None
        assert lone is not None
        assert torch.equal(lone.cpu().view(torch.uint8), answer.output.view(torch.uint8)), num_tokens


def test_shared_memory_gives_the_same_bits_in_any_company_and_is_let_go(
    served: tuple[Engine, list[MoELayer]], pinner: Pinner
) -> None:
    """Some calls lie in pinned memory and others do not; some are cancelled, and callers leave while theirs run."""
    engine, layers = served
    chance = random.Random(11)
    num_direct = 0
    for turn in range(20):
        calls = [
            replace(
                make_call(chance.choice(layers), chance.randrange(1, 120), turn * 100 + n, usual=True),
                return_routing=chance.random() < 0.2,
            )
            for n in range(24)
        ]
        lone = [engine.submit(by_bytes(call)).result(PATIENCE_S) for call in calls[:6]]
        memory = SharedMemory(pinner, 1 << 24).pin()
        given = [memory.placed(call) if chance.random() < 0.7 else call for call in calls]
        num_direct += sum(call.place is not None for call in given[:6])
        promises = [engine.submit(call) for call in given]
        for promise in promises[6:]:
            if chance.random() < 0.5:
                promise.cancel()
        del given
        for call, expected, promise in zip(calls, lone, promises, strict=False):
            answer = promise.result(PATIENCE_S)
            if isinstance(answer, bytes):
                assert memory.read(answer) == everything(pb.ForwardResponse.FromString(expected)), turn
            else:
                check(call, answer, f"turn {turn}")
        del memory, calls, promises, promise
    assert num_direct > 40
    assert engine.batcher.drain(PATIENCE_S)
    until_s = time.monotonic() + PATIENCE_S
    while pinner.pinned_bytes and time.monotonic() < until_s:
        time.sleep(0.01)
    assert pinner.pinned_bytes == 0


def test_pinning_goes_on_while_batches_run(served: tuple[Engine, list[MoELayer]], pinner: Pinner) -> None:
    """From memory that is not pinned yet to memory that is: the same bits all the way, a copy may be in two pieces."""
    engine, layers = served
    memory = SharedMemory(pinner, 6 * PIECE_BYTES)
    calls = [make_call(layers[0], 100, seed, usual=True) for seed in range(8)]
    expected = [engine.submit(by_bytes(call)).result(PATIENCE_S) for call in calls]
    for turn in range(48):
        placed = [memory.placed(call) for call in calls]
        for message, promise in zip(expected, [engine.submit(call) for call in placed], strict=True):
            answer = memory.read(promise.result(PATIENCE_S))
            assert answer == everything(pb.ForwardResponse.FromString(message)), turn
    assert pinner.pinned_bytes > PIECE_BYTES
