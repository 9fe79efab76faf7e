"""What benchmarks/bench_service.py makes of its command line, of figures, and of a server that is slow to begin."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from bench_client import a_job, open_for, while_it_asks
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _load import FailedError, Gate, Job, Record, Steps, ask_when_due, due_times, run_one
from _peers import Peer, PeerMissingError, compared, facts_of, running_peer
from _requests import RequestShape
from _v2 import Encoding, v2_message
from bench_service import open_places, parse_options

SHAPE = RequestShape(num_tokens=3, hidden_size=200, num_experts=5)
PATIENCE_S = 30.0


class TestCommandLine:
    def test_peers_are_names_with_interpreters(self) -> None:
        options = parse_options(["--transports", "--peer", "kserve=/a/python", "--peer", "mlserver=/b/python"])
        assert options.peer == [Peer("kserve", Path("/a/python")), Peer("mlserver", Path("/b/python"))]
        assert options.transports == []

    def test_without_any_there_are_none(self) -> None:
        options = parse_options([])
        assert options.peer == []
        assert options.transports == ["stream", "unary"]

    @pytest.mark.parametrize("text", ["kserve", "kserve=", "=/a/python", "triton=/a/python"])
    def test_what_is_wrong_is_told(self, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            parse_options(["--peer", text])
        said = capsys.readouterr().err
        assert f"is {text!r}, expected NAME=PYTHON" in said
        assert "kserve, mlserver, ray" in said


class TestPeers:
    def test_one_that_is_not_installed_is_missing_with_a_reason(self) -> None:
        with pytest.raises(PeerMissingError, match="mlserver"):
            facts_of(Peer("mlserver", Path(sys.executable)))

    def test_an_interpreter_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(PeerMissingError, match="cannot be run"):
            facts_of(Peer("kserve", tmp_path / "python"))

    def test_a_server_that_does_not_start_is_missing_with_a_reason(self) -> None:
        peer = Peer("mlserver", Path(sys.executable))
        why = "ended with exit code 1; it said last: ModuleNotFoundError: No module named 'mlserver'"
        with pytest.raises(PeerMissingError, match=why), running_peer(peer, 1, SHAPE, PATIENCE_S):
            pytest.fail("it started")

    def test_rows_say_how_many_times(self) -> None:
        rows = compared({"ours": (100.0, 600.0, 10.0), "theirs": (250.0, 200.0, 40.0)}, "ours")
        assert rows["ours"]["p50_over_ours"] == rows["ours"]["ours_over_throughput"] == 1.0
        assert rows["theirs"] == {
            "lone_p50_us": 250.0,
            "saturated_requests_per_s": 200.0,
            "cpu_us_per_request": 40.0,
            "p50_over_ours": 2.5,
            "ours_over_throughput": 3.0,
            "cpu_over_ours": 4.0,
        }


def model_infer_request() -> Any:
    """The message class, by the fields of the V2 protocol that are used here."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="v2_for_test.proto", package="v2test", syntax="proto3")
    tensor = file.message_type.add(name="InferInputTensor")
    for name, number, kind, label in (
        ("name", 1, field.TYPE_STRING, field.LABEL_OPTIONAL),
        ("datatype", 2, field.TYPE_STRING, field.LABEL_OPTIONAL),
        ("shape", 3, field.TYPE_INT64, field.LABEL_REPEATED),
    ):
        tensor.field.add(name=name, number=number, type=kind, label=label)
    request = file.message_type.add(name="ModelInferRequest")
    request.field.add(name="model_name", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    request.field.add(
        name="inputs",
        number=5,
        type=field.TYPE_MESSAGE,
        label=field.LABEL_REPEATED,
        type_name=".v2test.InferInputTensor",
    )
    request.field.add(name="raw_input_contents", number=7, type=field.TYPE_BYTES, label=field.LABEL_REPEATED)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("v2test.ModelInferRequest"))


@pytest.mark.parametrize("encoding", ["numbers", "bytes"])
def test_a_v2_message_has_the_bytes_of_the_request(encoding: Encoding) -> None:
    message = model_infer_request().FromString(v2_message(SHAPE, encoding))
    arrays = SHAPE.arrays()
    expected = [arrays[name].tobytes() for name in ("hidden_states", "routing_logits")]
    assert message.model_name == "moe"
    assert [tensor.name for tensor in message.inputs] == ["hidden_states", "routing_logits"]
    if encoding == "numbers":
        assert [tensor.datatype for tensor in message.inputs] == ["UINT8", "FP32"]
        assert [list(tensor.shape) for tensor in message.inputs] == [[3, 200], [3, 5]]
        assert list(message.raw_input_contents) == expected
    else:
        assert [(tensor.datatype, list(tensor.shape)) for tensor in message.inputs] == [("BYTES", [1])] * 2
        assert [np.frombuffer(raw[:4], "<u4")[0] for raw in message.raw_input_contents] == list(map(len, expected))
        assert [raw[4:] for raw in message.raw_input_contents] == expected


class SlowToBegin:
    """An echo whose first answer waits for the test."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.refuses = False

    def unary(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        assert self.may_answer.wait(PATIENCE_S)
        if self.refuses:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return bytes(SHAPE.answer_bytes)

    def stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for request in requests:
            yield self.unary(request, context)


@pytest.fixture
def slow() -> Iterator[tuple[SlowToBegin, str]]:
    service = SlowToBegin()
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(service.unary),
        "Stream": grpc.stream_stream_rpc_method_handler(service.stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, f"127.0.0.1:{port}"
    service.may_answer.set()
    server.stop(None).wait(PATIENCE_S)


@contextlib.contextmanager
def client(target: str, transport: str) -> Iterator[tuple[Job, Record, Gate]]:
    """One stream of a client process, from its start to its end."""
    method = f"/test.Echo/{transport.capitalize()}"
    job = a_job(transport, 2, target=target, method=method, layers=("a",), shape=vars(SHAPE))
    with while_it_asks(partial(run_one, job, 0)) as (record, gate):
        yield job, record, gate


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_no_clock_runs_before_a_client_has_had_an_answer(slow: tuple[SlowToBegin, str], transport: str) -> None:
    service, target = slow
    with client(target, transport) as (job, record, gate):
        assert not gate._arrived.acquire(timeout=0.2), "a slow server is waited for"
        service.may_answer.set()
        gate.wait_arrived(1)
        assert record.times == []
        open_for(0.5, job, gate)
    assert record.errors == {}
    assert record.times
    assert all(job.begin_s <= due_s <= done_s for due_s, done_s in record.times)


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_what_ends_a_client_is_told(slow: tuple[SlowToBegin, str], transport: str) -> None:
    service, target = slow
    service.refuses = True
    service.may_answer.set()
    with client(target, transport) as (_, record, gate):
        gate.wait_arrived(1)  # it will have none
        gate.open()
    assert record.times == []
    assert [what for what in record.errors if "RESOURCE_EXHAUSTED" in what]


class TakesItsTime:
    """A call of which nothing is known before a while has passed."""

    WHILE_S = 0.1

    def __init__(self, *, fails: bool = False) -> None:
        self.until_s = 0.0
        self.fails = fails

    def start(self) -> None:
        assert time.monotonic() >= self.until_s, "it is started before it was waited for"
        self.until_s = time.monotonic() + self.WHILE_S

    def wait(self) -> None:
        time.sleep(max(0.0, self.until_s - time.monotonic()))
        if self.fails:
            raise FailedError("it failed")


def asked_when_due(*, places: int, fails: bool = False) -> tuple[Record, list[float]]:
    """What becomes of 300 requests in a second, and when they were due."""
    job = a_job("sdk-shm-prepared", places, 300.0)
    calls = [TakesItsTime(fails=fails) for _ in range(places)]
    steps = [Steps(call, call.wait) for call in calls]
    with while_it_asks(lambda record, gate: ask_when_due(job, 0, record, gate, steps)) as (record, gate):
        gate.wait_arrived(1)
        open_for(1.0, job, gate)
    return record, list(due_times(job, 0))


def test_in_the_open_loop_nobody_waits_for_an_answer_before_the_next_is_asked_for() -> None:
    record, due = asked_when_due(places=100)
    assert [due_s for due_s, _ in record.times] == due
    assert record.errors == {}
    latencies = [done_s - due_s for due_s, done_s in record.times]
    assert min(latencies) >= TakesItsTime.WHILE_S
    assert np.median(latencies) < 3 * TakesItsTime.WHILE_S


def test_what_finds_no_place_waits_for_one_and_that_counts() -> None:
    record, due = asked_when_due(places=10)
    assert [due_s for due_s, _ in record.times] == due
    # Ten in a tenth of a second, a third of what is due.
    assert record.times[-1][1] - record.times[-1][0] > 1.0


def test_what_fails_is_counted_and_its_place_used_again() -> None:
    record, due = asked_when_due(places=40, fails=True)
    assert record.times == []
    assert record.errors == {"it failed": 40 + len(due)}


def test_places_of_the_open_loop_fit_in_what_a_client_shares() -> None:
    assert open_places("stream", SHAPE) == 100
    assert open_places("sdk-shm-prepared", SHAPE) == 60
    for num_tokens in (128, 512, 1024):
        shape = RequestShape(num_tokens, 2048, 128)
        places = open_places("sdk-shm-prepared", shape)
        assert 8 < places * (shape.request_bytes + shape.answer_bytes + 3 * 8192) / 2**20 < 127, "half of 256 MiB"
