"""Malformed requests while good ones run: each is refused by name, and nobody else notices."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from serving import (
    HIDDEN_SIZE,
    LAYER,
    NUM_EXPERTS,
    PATIENCE_S,
    TOP_K,
    Running,
    answer_of,
    any_request,
    bfloat16,
    failure_of,
    insecure_channel,
    request,
    running,
    stream_failure_of,
    tensor,
)

from expertd.v1 import expertd_pb2 as pb
from expertd.v1 import expertd_pb2_grpc

SEED = 20261123
NUM_BAD = 2000

# Between two rounds of NUM_BAD each, the resident set may grow by this much; a round carries several times as much. The
# first round is the warm-up: connections, threads, arenas and caches have their size after it.
RSS_SLACK_BYTES = 8 * 2**20

Random = np.random.Generator
Vandal = Callable[[Random, pb.ForwardRequest], str]
"""Spoils a good request; returns the field that the refusal must name."""


def _tensor_of(chance: Random, asked: pb.ForwardRequest) -> tuple[str, pb.Tensor]:
    name = chance.choice([field.name for field, _ in asked.ListFields() if field.name not in ("layer", "options")])
    return str(name), getattr(asked, str(name))


def rank(chance: Random, asked: pb.ForwardRequest) -> str:
    name, spoiled = _tensor_of(chance, asked)
    shapes = ([], list(spoiled.shape)[:1], [*spoiled.shape, 1], [1, *spoiled.shape], [1] * 1000)
    spoiled.ClearField("shape")
    spoiled.shape.extend(shapes[chance.integers(len(shapes))])
    return f"{name}.shape"


def columns(chance: Random, asked: pb.ForwardRequest) -> str:
    name, spoiled = _tensor_of(chance, asked)
    spoiled.shape[1] += int(chance.choice([1, 7, 2**31]))
    return f"{name}.shape"


def rows(chance: Random, asked: pb.ForwardRequest) -> str:
    """The tensors disagree about the number of tokens."""
    others = [f.name for f, _ in asked.ListFields() if f.name not in ("layer", "options", "hidden_states")]
    name = str(chance.choice(others))
    getattr(asked, name).shape[0] += 1
    return f"{name}.shape"


def element_type(chance: Random, asked: pb.ForwardRequest) -> str:
    name, spoiled = _tensor_of(chance, asked)
    wrong = {"hidden_states": [0, 5, 6, -1], "topk_ids": [0, 1, 2, 3, 4, 99], "topk_weights": [0, 3, 4, 5, 2**31 - 1]}
    spoiled.dtype = int(chance.choice(wrong.get(name, [0, 3, 4, 5, 77])))
    return f"{name}.dtype"


def byte_count(chance: Random, asked: pb.ForwardRequest) -> str:
    name, spoiled = _tensor_of(chance, asked)
    spoiled.data = (spoiled.data[:-1], spoiled.data + b"\0", b"", spoiled.data * 2)[chance.integers(4)]
    return f"{name}.data"


def too_many_tokens(chance: Random, asked: pb.ForwardRequest) -> str:
    asked.hidden_states.shape[0] = int(chance.choice([4097, 2**31, 2**32 - 1]))
    return "hidden_states"


def ids(chance: Random, asked: pb.ForwardRequest) -> str:
    tokens = asked.hidden_states.shape[0]
    values = chance.integers(-1, NUM_EXPERTS, (tokens, TOP_K)).astype(np.int32)
    values.flat[chance.integers(values.size)] = chance.choice([-2, NUM_EXPERTS, 2**31 - 1, -(2**31)])
    asked.ClearField("routing_logits")
    asked.topk_ids.CopyFrom(tensor(values, pb.DATA_TYPE_INT32))
    asked.topk_weights.CopyFrom(bfloat16(chance.random((tokens, TOP_K), np.float32)))
    return "topk_ids.data"


def nan_logits(chance: Random, asked: pb.ForwardRequest) -> str:
    tokens = asked.hidden_states.shape[0]
    values = chance.standard_normal((tokens, NUM_EXPERTS), np.float32)
    values.flat[chance.integers(values.size)] = np.nan
    asked.ClearField("topk_ids")
    asked.ClearField("topk_weights")
    is_float = bool(chance.integers(2))
    asked.routing_logits.CopyFrom(tensor(values, pb.DATA_TYPE_FLOAT32) if is_float else bfloat16(values))
    return "routing_logits.data"


def nan_weights(chance: Random, asked: pb.ForwardRequest) -> str:
    ids(chance, asked)
    asked.topk_ids.data = bytes(len(asked.topk_ids.data))
    values = chance.random((asked.hidden_states.shape[0], TOP_K), np.float32)
    values.flat[chance.integers(values.size)] = -np.nan
    is_float = bool(chance.integers(2))
    asked.topk_weights.CopyFrom(tensor(values, pb.DATA_TYPE_FLOAT32) if is_float else bfloat16(values))
    return "topk_weights.data"


def routing_kinds(chance: Random, asked: pb.ForwardRequest) -> str:
    tokens = asked.hidden_states.shape[0]
    logits = tensor(np.zeros((tokens, NUM_EXPERTS), np.float32), pb.DATA_TYPE_FLOAT32)
    match chance.integers(3):
        case 0:  # none
            for field in ("routing_logits", "topk_ids", "topk_weights"):
                asked.ClearField(field)
        case 1:  # both
            asked.routing_logits.CopyFrom(logits)
            asked.topk_ids.CopyFrom(tensor(np.zeros((tokens, TOP_K), np.int32), pb.DATA_TYPE_INT32))
        case _:  # half of one
            asked.ClearField("routing_logits")
            asked.ClearField("topk_weights")
            asked.topk_ids.CopyFrom(tensor(np.zeros((tokens, TOP_K), np.int32), pb.DATA_TYPE_INT32))
            return "topk_weights"
    return "routing_logits"


def no_hidden_states(chance: Random, asked: pb.ForwardRequest) -> str:
    asked.ClearField("hidden_states")
    return "hidden_states"


def output_type(chance: Random, asked: pb.ForwardRequest) -> str:
    asked.options.output_dtype = int(chance.choice([4, 5, 6, -3, 2**31 - 1]))
    return "options.output_dtype"


def layer_name(chance: Random, asked: pb.ForwardRequest) -> str:
    asked.layer = str(chance.choice(["", "nowhere", LAYER + " ", LAYER.upper(), "層" * 85, "x" * 257, "x" * 100_000]))
    return "layer"


VANDALS: tuple[Vandal, ...] = (
    rank,
    columns,
    rows,
    element_type,
    byte_count,
    too_many_tokens,
    ids,
    nan_logits,
    nan_weights,
    routing_kinds,
    no_hidden_states,
    output_type,
    layer_name,
)


def spoiled_request(chance: Random) -> tuple[pb.ForwardRequest, str, str]:
    """A malformed message, who spoiled it, and the field to be named."""
    asked = any_request(chance, int(chance.integers(1, 65)))
    vandal = VANDALS[chance.integers(len(VANDALS))]
    return asked, vandal.__name__, vandal(chance, asked)


def random_bytes(chance: Random) -> bytes:
    """Bytes that are no request: noise, cut or flipped messages, known fields of a wrong wire type."""
    good = request(chance, 2).SerializeToString()
    match chance.integers(4):
        case 0:
            return chance.bytes(int(chance.integers(1, 2000)))
        case 1:
            return good[: chance.integers(len(good))]
        case 2:
            flipped = bytearray(good)
            flipped[chance.integers(30)] ^= 1 << chance.integers(8)
            return bytes(flipped)
        case _:
            # Every field of ForwardRequest as a varint.
            return b"".join(bytes([field << 3, int(chance.integers(128))]) for field in range(1, 8))


def check_spoiled(chance: Random, stub: expertd_pb2_grpc.ExpertServiceStub, number: int) -> None:
    asked, vandal, field = spoiled_request(chance)
    what = f"seed {SEED} request {number} spoiled by {vandal}, shape {list(asked.hidden_states.shape)}"
    if chance.integers(2):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Forward(asked, timeout=PATIENCE_S)
        failure = failure_of(caught.value)
    else:
        answers = list(stub.ForwardStream(iter([pb.ForwardStreamRequest(id=number, request=asked)])))
        assert [answer.id for answer in answers] == [number], what
        assert answers[0].HasField("error"), what
        failure = stream_failure_of(answers[0].error)
    if failure.code == grpc.StatusCode.NOT_FOUND:
        assert field == "layer", what
        assert asked.layer in failure.message, what
    else:
        assert failure.code == grpc.StatusCode.INVALID_ARGUMENT, f"{what}: {failure}"
        assert any(named == field or named.startswith(f"{field}.") for named in failure.fields), f"{what}: {failure}"
        assert all(named in failure.message for named in failure.fields), what


def check_random_bytes(chance: Random, channel: grpc.Channel, number: int) -> None:
    """Bytes may by chance be a good request still: then, and only then, they may be answered."""
    data = random_bytes(chance)
    what = f"seed {SEED} bytes {number}"
    try:
        answer = channel.unary_unary("/expertd.v1.ExpertService/Forward")(data, timeout=PATIENCE_S)
    except grpc.RpcError as error:
        failure = failure_of(error)
        assert failure.code.name in ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"), f"{what}: {failure}"
        assert failure.fields or failure.code.name != "INVALID_ARGUMENT", what
    else:
        assert (
            pb.ForwardRequest.FromString(data).hidden_states.shape == pb.ForwardResponse.FromString(answer).output.shape
        ), what


@pytest.fixture(scope="module")
def live() -> Any:
    with running() as server:
        yield server


def test_malformed_requests_are_refused_by_name_while_good_ones_run(live: Running) -> None:
    chance = np.random.default_rng(SEED)
    good = [any_request(chance, int(chance.integers(0, 40))) for _ in range(12)]
    lone = [answer_of(live.stub.Forward(one)) for one in good]
    is_over = threading.Event()

    def good_client(number: int) -> int:
        checked = 0
        with insecure_channel(live.server.port) as channel:
            stub = expertd_pb2_grpc.ExpertServiceStub(channel)
            while not is_over.is_set():
                n = (number + checked) % len(good)
                shape = list(good[n].hidden_states.shape)
                assert answer_of(stub.Forward(good[n], timeout=PATIENCE_S)) == lone[n], f"seed {SEED} good {n} {shape}"
                checked += 1
        return checked

    def bad_client(client: int) -> None:
        mine = np.random.default_rng([SEED, client])
        with insecure_channel(live.server.port) as channel:
            stub = expertd_pb2_grpc.ExpertServiceStub(channel)
            for number in range(NUM_BAD // 2):
                if mine.integers(5) == 0:
                    check_random_bytes(mine, channel, number)
                else:
                    check_spoiled(mine, stub, number)

    process = psutil.Process()
    rss: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        good_clients = [pool.submit(good_client, number) for number in range(2)]
        try:
            for clients in ((1, 2), (3, 4)):
                list(pool.map(bad_client, clients))
                gc.collect()
                rss.append(process.memory_info().rss)
        finally:
            is_over.set()
        checked = [client.result(PATIENCE_S) for client in good_clients]
    assert min(checked) > 10, f"the good clients hardly ran: {checked}"
    assert rss[1] - rss[0] < RSS_SLACK_BYTES, f"seed {SEED}: the resident set went from {rss[0]} to {rss[1]} bytes"
    assert [answer_of(live.stub.Forward(one)) for one in good] == lone
    assert live.server.engine.batcher.queue_requests == 0


def test_the_largest_tensor_a_message_can_claim_costs_nothing(live: Running) -> None:
    """The shape is checked before anything of its size is made."""
    asked = request(np.random.default_rng(SEED), 1)
    asked.hidden_states.shape[:] = [2**32 - 1, HIDDEN_SIZE]
    with pytest.raises(grpc.RpcError) as caught:
        live.stub.Forward(asked)
    assert set(failure_of(caught.value).fields) >= {"hidden_states.data"}
