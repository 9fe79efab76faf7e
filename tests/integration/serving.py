"""A real server in this process, on a free port, and what tests of it need: clients, inputs, a backend to steer."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import torch
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from expertd.v1 import expertd_pb2 as pb
from expertd.v1 import expertd_pb2_grpc
from expertd_server.backend import Backend, MoEOutput, PreparedLayer
from expertd_server.backend_cpu import TorchBackend
from expertd_server.config import Config
from expertd_server.engine_process import EngineProcess
from expertd_server.frontend import Frontend
from expertd_server.layer import MoELayer
from expertd_server.server import Server
from expertd_server.synthetic import synthetic_layers
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

LAYER = "synthetic.tiny.0"
OTHER_LAYER = "synthetic.tiny.1"
HIDDEN_SIZE, NUM_EXPERTS, TOP_K = 256, 8, 2

# No test waits this long unless it fails.
PATIENCE_S = 30.0


def tiny_layers(backend: Backend, *, weights_version: int = 1, seed: int = 0) -> list[MoELayer]:
    """LAYER and OTHER_LAYER."""
    return [
        MoELayer(name, backend.prepare(spec, weights), backend, weights_version)
        for name, spec, weights in synthetic_layers("tiny", 2, seed=seed)
    ]


@dataclass
class SteeredBackend:
    """The CPU backend, which a test can hold up, and which fails on hidden states that hold POISON."""

    POISON = 0x7F  # NaN, which no input below becomes

    name: str = "cpu"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    inner: TorchBackend = field(default_factory=lambda: TorchBackend("cpu"))
    gate: threading.Event = field(default_factory=threading.Event)
    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    batches: list[int] = field(default_factory=list)
    """Tokens of each call of forward."""

    def prepare(self, spec: LayerSpec, weights: ExpertWeights, *, max_num_tokens: int = 8192) -> PreparedLayer:
        return self.inner.prepare(spec, weights, max_num_tokens=max_num_tokens)

    def forward(self, layer: PreparedLayer, hidden_states: torch.Tensor, **arguments: Any) -> MoEOutput:
        self.batches.append(hidden_states.shape[0])
        self.started.release()
        assert self.gate.wait(PATIENCE_S), "the test never opened the gate"
        if hidden_states.dtype == torch.float8_e4m3fn and (hidden_states.view(torch.uint8) == self.POISON).any():
            raise RuntimeError("poisoned")
        return self.inner.forward(layer, hidden_states, **arguments)

    def wait_started(self) -> None:
        """Return when forward was entered once more."""
        assert self.started.acquire(timeout=PATIENCE_S), "no batch started"


@dataclass
class Running:
    """A started server and a channel to it."""

    server: Server
    channel: grpc.Channel

    @property
    def stub(self) -> expertd_pb2_grpc.ExpertServiceStub:
        return expertd_pb2_grpc.ExpertServiceStub(self.channel)


@contextlib.contextmanager
def running(backend: Backend | None = None, **options: Any) -> Iterator[Running]:
    """A server of the two tiny layers, shut down at the end."""
    backend = TorchBackend("cpu") if backend is None else backend
    server = Server(Config(**{"port": 0} | options), backend=backend, layers=tiny_layers(backend))
    try:
        assert server.startup()
        with insecure_channel(server.port) as channel:
            yield Running(server, channel)
    finally:
        if isinstance(backend, SteeredBackend):
            backend.gate.set()
        server.shutdown()


def insecure_channel(port: int) -> grpc.Channel:
    """A channel of its own connection."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.insecure_channel(f"127.0.0.1:{port}", options=options)


def tensor(array: np.ndarray[Any, Any], dtype: int) -> pb.Tensor:
    """An array's bytes as the given wire type."""
    return pb.Tensor(dtype=dtype, shape=array.shape, data=array.tobytes())


def bfloat16(array: np.ndarray[Any, Any]) -> pb.Tensor:
    """An array rounded to bfloat16."""
    rounded = torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy()
    return tensor(rounded, pb.DATA_TYPE_BFLOAT16)


def fp8_hidden(random: np.random.Generator, num_tokens: int) -> pb.Tensor:
    """Random finite FP8 hidden states of either sign, below 448 in magnitude."""
    codes = random.integers(0, 0x70, (num_tokens, HIDDEN_SIZE), dtype=np.uint8)
    codes |= random.integers(0, 2, codes.shape, dtype=np.uint8) << 7
    return tensor(codes, pb.DATA_TYPE_FLOAT8_E4M3FN)


def logits(random: np.random.Generator, num_tokens: int) -> pb.Tensor:
    """Random float32 logits."""
    return tensor(random.standard_normal((num_tokens, NUM_EXPERTS), np.float32), pb.DATA_TYPE_FLOAT32)


def request(random: np.random.Generator, num_tokens: int, layer: str = LAYER, **fields: Any) -> pb.ForwardRequest:
    """A good request with FP8 hidden states and float32 logits."""
    return pb.ForwardRequest(
        layer=layer, hidden_states=fp8_hidden(random, num_tokens), routing_logits=logits(random, num_tokens), **fields
    )


def any_request(random: np.random.Generator, num_tokens: int, layer: str = LAYER) -> pb.ForwardRequest:
    """A good request of any kind: input types, routing by the server or by the caller, output type."""
    result = pb.ForwardRequest(layer=layer)
    hidden = random.standard_normal((num_tokens, HIDDEN_SIZE), np.float32)
    match random.integers(4):
        case 0:
            result.hidden_states.CopyFrom(fp8_hidden(random, num_tokens))
        case 1:
            result.hidden_states.CopyFrom(bfloat16(hidden))
        case 2:
            result.hidden_states.CopyFrom(tensor(hidden.astype(np.float16), pb.DATA_TYPE_FLOAT16))
        case _:
            result.hidden_states.CopyFrom(tensor(hidden, pb.DATA_TYPE_FLOAT32))
    match random.integers(4):
        case 0:
            result.routing_logits.CopyFrom(logits(random, num_tokens))
        case 1:
            result.routing_logits.CopyFrom(bfloat16(random.standard_normal((num_tokens, NUM_EXPERTS), np.float32)))
        case kind:
            ids = random.permuted(np.tile(np.arange(-1, NUM_EXPERTS, dtype=np.int32), (num_tokens, 1)), axis=1)
            weights = random.random((num_tokens, TOP_K), np.float32)
            result.topk_ids.CopyFrom(tensor(np.ascontiguousarray(ids[:, :TOP_K]), pb.DATA_TYPE_INT32))
            is_float = kind == 2
            result.topk_weights.CopyFrom(tensor(weights, pb.DATA_TYPE_FLOAT32) if is_float else bfloat16(weights))
    result.options.output_dtype = int(random.integers(4))
    if random.integers(4) == 0:
        result.options.do_finalize = False
    result.options.return_routing = bool(random.integers(2))
    return result


def answer_of(response: pb.ForwardResponse) -> bytes:
    """Everything of an answer but the timing, which is never the same twice."""
    copy = pb.ForwardResponse()
    copy.CopyFrom(response)
    copy.ClearField("timing")
    return copy.SerializeToString(deterministic=True)


@dataclass(frozen=True)
class Failure:
    """A failed call, its google.rpc details unpacked."""

    code: grpc.StatusCode
    message: str
    reason: str
    fields: tuple[str, ...]
    """Paths of the violations."""
    retry_delay_s: float | None


def failure_of(error: grpc.RpcError) -> Failure:
    """What a failed call says. Fails unless it carries ErrorInfo of this service."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no google.rpc.Status: {error}"
    return _failure(error.code(), status)


def stream_failure_of(error: pb.StreamError) -> Failure:
    """The same of one request of a stream."""
    code = next(code for code in grpc.StatusCode if code.value[0] == error.code)
    return _failure(code, status_pb2.Status(code=error.code, message=error.message, details=error.details))


def _failure(code: grpc.StatusCode, status: status_pb2.Status) -> Failure:
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    unpacked = {type(kind): any(detail.Unpack(kind) for detail in status.details) for kind in (info, bad, retry)}
    assert unpacked[error_details_pb2.ErrorInfo], f"no ErrorInfo: {status}"
    assert info.domain == "expertd", status
    has_delay = unpacked[error_details_pb2.RetryInfo]
    return Failure(
        code,
        status.message,
        info.reason,
        tuple(violation.field for violation in bad.field_violations),
        retry.retry_delay.ToNanoseconds() / 1e9 if has_delay else None,
    )


@dataclass
class Split:
    """A server whose front-ends and engine have processes' worth of objects each, here all in one process."""

    engine: EngineProcess
    frontends: list[Frontend]
    channels: list[grpc.Channel]
    """One to each front-end, which here have ports of their own."""
    ports: list[int]

    @property
    def stubs(self) -> list[expertd_pb2_grpc.ExpertServiceStub]:
        return [expertd_pb2_grpc.ExpertServiceStub(channel) for channel in self.channels]


@contextlib.contextmanager
def split(num_frontends: int = 2, backend: Backend | None = None, **options: Any) -> Iterator[Split]:
    """A server of the two tiny layers with front-ends, shut down at the end."""
    backend = TorchBackend("cpu") if backend is None else backend
    config = Config(
        port=0, frontends=num_frontends, **{"max_message_bytes": 2**21, "frontend_arena_bytes": 2**22} | options
    )
    inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with inlet, outlet, contextlib.ExitStack() as stack:
        engine = EngineProcess(config, outlet, backend=backend, layers=tiny_layers(backend))
        stack.callback(engine.shutdown)
        frontends, channels, ports = [], [], []
        for number in range(num_frontends):
            serving = threading.Event()
            frontend = Frontend(
                config, f"frontend-{number}", inlet, "an-instance", lambda is_so, event=serving: is_so and event.set()
            )
            stack.callback(frontend.shutdown)
            ports.append(frontend.start(0))
            channels.append(stack.enter_context(insecure_channel(ports[-1])))
            frontends.append(frontend)
            if number == 0:
                assert engine.startup(lambda: False)
            assert serving.wait(PATIENCE_S), "the front-end never served"
        try:
            yield Split(engine, frontends, channels, ports)
        finally:
            if isinstance(backend, SteeredBackend):
                backend.gate.set()
