"""Malformed requests while good ones run: each is refused by name, and nobody else notices.

The servers are processes of their own, so that their lives and their memory can be watched from outside.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import psutil
import pytest
from google.protobuf.message import DecodeError
from serving import (
    HIDDEN_SIZE,
    LAYER,
    NUM_EXPERTS,
    OTHER_LAYER,
    PATIENCE_S,
    TOP_K,
    Failure,
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
from test_processes import Processes, wait_for

from expertd.v1 import expertd_pb2 as pb
from expertd.v1 import expertd_pb2_grpc

SEED = 20261123
NUM_BAD = 600

# In all rounds of NUM_BAD but the first, the resident set of a process of the server may grow by this much; they carry
# many times as much. The first round is the warm-up: connections, threads, arenas and caches have their size then.
RSS_SLACK_BYTES = 2 * 2**20

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


def weights_version(chance: Random, asked: pb.ForwardRequest) -> str:
    asked.weights_version = int(chance.choice([2, 7, 2**63 - 1]))
    return "weights_version"


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
    weights_version,
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


def check_refusal(failure: Failure, asked: pb.ForwardRequest, what: str) -> None:
    """The status codes that there are for a request that cannot be answered, and only where they are due."""
    match failure.code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            assert failure.fields, f"{what}: {failure}"
            assert all(named in failure.message for named in failure.fields), f"{what}: {failure}"
        case grpc.StatusCode.NOT_FOUND:
            assert failure.reason == "LAYER_NOT_FOUND", f"{what}: {failure}"
            assert asked.layer not in (LAYER, OTHER_LAYER), f"{what}: {failure}"
        case grpc.StatusCode.FAILED_PRECONDITION:
            # The request itself may be in order: the server holds no such version now, but may tomorrow.
            assert failure.reason == "WEIGHTS_VERSION_NOT_HELD", f"{what}: {failure}"
            assert asked.weights_version not in (0, 1), f"{what}: {failure}"
        case _:
            pytest.fail(f"{what}: {failure}")


def check_spoiled(chance: Random, channel: grpc.Channel, number: int) -> None:
    """A spoiled request, unary or on a stream, is refused, and the refusal names what was spoiled."""
    stub = expertd_pb2_grpc.ExpertServiceStub(channel)
    asked, vandal, field = spoiled_request(chance)
    what = f"seed {SEED} request {number} spoiled by {vandal}, shape {list(asked.hidden_states.shape)}"
    if chance.integers(2):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Forward(asked, timeout=PATIENCE_S)
        failure = failure_of(caught.value)
    else:
        messages = iter([pb.ForwardStreamRequest(id=number, request=asked)])
        answers = list(stub.ForwardStream(messages, timeout=PATIENCE_S))
        assert [answer.id for answer in answers] == [number], what
        assert answers[0].HasField("error"), what
        failure = stream_failure_of(answers[0].error)
    check_refusal(failure, asked, what)
    if failure.code == grpc.StatusCode.NOT_FOUND:
        assert field == "layer", what
        assert asked.layer in failure.message, what
    elif failure.code == grpc.StatusCode.FAILED_PRECONDITION:
        assert field == "weights_version", what
    else:
        assert any(named == field or named.startswith(f"{field}.") for named in failure.fields), f"{what}: {failure}"


def check_random_bytes(chance: Random, channel: grpc.Channel, number: int) -> None:
    """Bytes may by chance be a good request still: then, and only then, they may be answered."""
    data = random_bytes(chance)
    what = f"seed {SEED} bytes {number}"
    try:
        answer = channel.unary_unary("/expertd.v1.ExpertService/Forward")(data, timeout=PATIENCE_S)
    except grpc.RpcError as error:
        failure = failure_of(error)
        try:
            asked = pb.ForwardRequest.FromString(data)
        except DecodeError:
            assert failure.code == grpc.StatusCode.INVALID_ARGUMENT, f"{what}: {failure}"
        else:
            check_refusal(failure, asked, what)
    else:
        asked = pb.ForwardRequest.FromString(data)
        assert pb.ForwardResponse.FromString(answer).output.shape == asked.hidden_states.shape, what


def stream_bytes(chance: Random) -> bytes:
    """Bytes that are no message of a stream, or are one and hold bytes that are no request."""
    match chance.integers(4):
        case 0:
            return chance.bytes(int(chance.integers(1, 2000)))
        case 1:
            good = pb.ForwardStreamRequest(id=1, request=request(chance, 2)).SerializeToString()
            return good[: chance.integers(1, len(good))]
        case _:
            inner = random_bytes(chance)
            length, more = bytearray(), len(inner)
            while more > 0x7F:
                length.append(more & 0x7F | 0x80)
                more >>= 7
            length.append(more)
            return b"\x08\x01\x12" + length + inner  # as the field `request`, after the id 1


def check_random_bytes_on_a_stream(chance: Random, channel: grpc.Channel, number: int) -> None:
    """One message between two good ones: it fails alone where it is a message at all, and else ends the stream."""
    data = stream_bytes(chance)
    what = f"seed {SEED} stream bytes {number}"
    before, after = 2**60, 2**60 + 1  # ids that no such bytes have
    good = request(chance, 1)
    messages = [pb.ForwardStreamRequest(id=one, request=good).SerializeToString() for one in (before, after)]
    messages.insert(1, data)
    answers: dict[int, pb.ForwardStreamResponse] = {}
    ended = None
    try:
        for raw in channel.stream_stream("/expertd.v1.ExpertService/ForwardStream")(iter(messages), timeout=PATIENCE_S):
            answer = pb.ForwardStreamResponse.FromString(raw)
            answers[answer.id] = answer
    except grpc.RpcError as error:
        ended = failure_of(error)
    assert answers[before].HasField("response"), f"{what}: {answers}"
    try:
        message = pb.ForwardStreamRequest.FromString(data)
    except DecodeError:
        assert ended is not None, f"{what}: {answers}"
        assert ended.code == grpc.StatusCode.INVALID_ARGUMENT, f"{what}: {ended}"
        assert set(answers) == {before}, f"{what}: {answers}"
        return
    assert ended is None, f"{what}: {ended}"
    assert set(answers) == {before, message.id, after}, f"{what}: {answers}"
    assert answer_of(answers[after].response) == answer_of(answers[before].response), what
    of_bytes = answers[message.id]
    if of_bytes.HasField("error"):
        check_refusal(stream_failure_of(of_bytes.error), message.request, what)
    else:
        assert of_bytes.response.output.shape == message.request.hidden_states.shape, what


@pytest.fixture(scope="module", params=["0", "1"], ids=["one process", "a front-end"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("server"), "--frontends", request.param) as processes:
        processes.facts()
        yield processes


def test_malformed_requests_are_refused_by_name_while_good_ones_run(server: Processes) -> None:
    chance = np.random.default_rng(SEED)
    good = [any_request(chance, int(chance.integers(0, 40))) for _ in range(12)]
    with running() as one:
        lone = [answer_of(one.stub.Forward(asked)) for asked in good]
    port = server.facts()["port"]
    main = psutil.Process(server.popen.pid)
    processes = [main, *main.children(recursive=True)]
    is_over = threading.Event()

    def good_client(number: int) -> int:
        checked = 0
        with insecure_channel(port) as channel:
            stub = expertd_pb2_grpc.ExpertServiceStub(channel)
            while not is_over.is_set():
                n = (number + checked) % len(good)
                shape = list(good[n].hidden_states.shape)
                assert answer_of(stub.Forward(good[n], timeout=PATIENCE_S)) == lone[n], f"seed {SEED} good {n} {shape}"
                checked += 1
        return checked

    def bad_client(client: int) -> None:
        mine = np.random.default_rng([SEED, client])
        checks = (check_random_bytes, check_random_bytes_on_a_stream, check_spoiled, check_spoiled, check_spoiled)
        with insecure_channel(port) as channel:
            for number in range(NUM_BAD // 2):
                checks[mine.integers(len(checks))](mine, channel, number)

    rss: list[list[int]] = []
    with ThreadPoolExecutor(4) as pool:
        good_clients = [pool.submit(good_client, number) for number in range(2)]
        try:
            for clients in ((1, 2), (3, 4), (5, 6)):
                list(pool.map(bad_client, clients))
                rss.append([process.memory_info().rss for process in processes])
        finally:
            is_over.set()
        checked = [client.result(PATIENCE_S) for client in good_clients]
    assert min(checked) > 10, f"the good clients hardly ran: {checked}"
    for process, before, after in zip(processes, rss[0], rss[-1], strict=True):
        assert after - before < RSS_SLACK_BYTES, f"seed {SEED}: {process.cmdline()[3:5]}: {before} -> {after} bytes"
    with insecure_channel(port) as channel:
        stub = expertd_pb2_grpc.ExpertServiceStub(channel)
        assert [answer_of(stub.Forward(asked, timeout=PATIENCE_S)) for asked in good] == lone
    nobody = frozenset[tuple[str, str]]()
    wait_for(lambda: server.scrape()["expertd_in_flight_requests", nobody] == 0)
    assert server.scrape()["expertd_queue_requests", nobody] == 0
    assert [main, *main.children(recursive=True)] == processes, "a process of the server was started again"


def test_the_largest_tensor_a_message_can_claim_costs_nothing(server: Processes) -> None:
    """The shape is checked before anything of its size is made."""
    asked = request(np.random.default_rng(SEED), 1)
    asked.hidden_states.shape[:] = [2**32 - 1, HIDDEN_SIZE]
    with insecure_channel(server.facts()["port"]) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            expertd_pb2_grpc.ExpertServiceStub(channel).Forward(asked, timeout=PATIENCE_S)
        assert set(failure_of(caught.value).fields) >= {"hidden_states.data"}


def test_a_server_that_was_sent_all_of_this_ends_as_any_other(server: Processes) -> None:
    """The last of each server."""
    server.popen.send_signal(signal.SIGTERM)
    assert server.popen.wait(PATIENCE_S) == 0, server.errors()
    assert "Traceback" not in server.errors()
