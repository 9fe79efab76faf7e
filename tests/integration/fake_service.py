"""An ExpertService in this process that answers exactly and fails on demand.

The fake layer is small enough to be computed twice: expert e multiplies by e + 1. The gRPC in between is real.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import ml_dtypes
import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2
from grpc_health.v1 import health, health_pb2_grpc

from expertd.v1 import expertd_pb2 as pb
from expertd.v1 import expertd_pb2_grpc as pb_grpc

H, E, K, FIRST, LOCAL, MAX_TOKENS = 16, 8, 3, 2, 4, 10
NUMPY = {1: np.dtype("f4"), 2: np.dtype(ml_dtypes.bfloat16), 3: np.dtype("f2"), 4: np.dtype(ml_dtypes.float8_e4m3fn)}
NUMPY[5] = np.dtype("i4")
BFLOAT16 = ml_dtypes.bfloat16
PADDING_ROW = 77.0
Hook = Callable[[pb.ForwardRequest], None]


class RefusedError(Exception):
    """What the fake service answers instead of a result."""

    def __init__(self, code: grpc.StatusCode, message: str, *details: Message) -> None:
        super().__init__(message)
        self.status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            self.status.details.append(AnyMessage())
            self.status.details[-1].Pack(detail)


class BrokenStreamError(Exception):
    """The stream (or the call) ends with INTERNAL, as when a server process dies."""


def as_array(tensor: pb.Tensor) -> np.ndarray[Any, Any]:
    flat: np.ndarray[Any, Any] = np.frombuffer(tensor.data, dtype=NUMPY[tensor.dtype])
    return flat.reshape(tuple(tensor.shape))


def as_message(array: np.ndarray[Any, Any]) -> pb.Tensor:
    code = next(code for code, dtype in NUMPY.items() if dtype == array.dtype)
    return pb.Tensor(dtype=pb.DataType.Name(code), shape=array.shape, data=array.tobytes())


def route(logits: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    scores = logits.astype(np.float32)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :K].astype(np.int32)
    return ids, np.take_along_axis(scores, ids, 1).astype(BFLOAT16)


def expert_rows(hidden: np.ndarray[Any, Any], ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[T, K, H]: what expert ids[t, k] makes of token t."""
    return (hidden.astype(np.float32)[:, None, :] * (ids[:, :, None] + 1)).astype(BFLOAT16)


def is_local(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (ids >= FIRST) & (ids < FIRST + LOCAL)


def finalize(hidden: np.ndarray[Any, Any], ids: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> Any:
    rows = expert_rows(hidden, ids).astype(np.float32) * weights.astype(np.float32)[:, :, None]
    return np.where(is_local(ids)[:, :, None], rows, np.float32(0)).sum(axis=1, dtype=np.float32)


class FakeService(pb_grpc.ExpertServiceServicer):
    """Computes the fake layer; `hook` sees every request first and may wait, refuse or break the stream."""

    def __init__(self) -> None:
        self.hook: Hook = lambda request: None
        self.version = 1
        self.scale: float | None = 1.0
        self.hidden_size = H
        self.max_message_bytes = 0
        self.ballast = b""
        self.metadata: list[dict[str, str | bytes]] = []
        self.timeouts_ms: list[int] = []
        self.parts: list[int] = []
        self.streams = 0
        self.info_calls = 0

    def answer(self, request: pb.ForwardRequest) -> pb.ForwardResponse:
        self.parts.append(request.hidden_states.shape[0])
        self.hook(request)
        version = request.weights_version or self.version
        hidden = as_array(request.hidden_states)
        if request.HasField("routing_logits"):
            ids, weights = route(as_array(request.routing_logits))
        else:
            ids, weights = as_array(request.topk_ids), as_array(request.topk_weights).astype(BFLOAT16)
        response = pb.ForwardResponse(weights_version=version, timing=pb.Timing(batch_tokens=len(hidden), compute_us=5))
        response.gemm2_output.data = self.ballast
        options = request.options
        finalized = options.do_finalize or not options.HasField("do_finalize")
        if finalized:
            dtype = NUMPY[options.output_dtype or pb.DATA_TYPE_BFLOAT16]
            response.output.CopyFrom(as_message(finalize(hidden, ids, weights).astype(dtype)))
        else:
            self._separate(response, hidden, ids)
        if not finalized or options.return_routing:
            response.expert_weights.CopyFrom(as_message(weights))
        if options.return_routing:
            response.topk_ids.CopyFrom(as_message(ids))
        return response

    def _separate(self, response: pb.ForwardResponse, hidden: np.ndarray[Any, Any], ids: np.ndarray[Any, Any]) -> None:
        """Rows by expert, one row of padding after each, slots of an expert in falling order (any order is allowed)."""
        rows, flat = expert_rows(hidden, ids).reshape(-1, H), ids.reshape(-1)
        index = np.full(flat.size, -1, dtype=np.int32)
        out: list[np.ndarray[Any, Any]] = []
        for expert in range(FIRST, FIRST + LOCAL):
            for slot in np.flatnonzero(flat == expert)[::-1]:
                index[slot] = len(out)
                out.append(rows[slot])
            out.append(np.full(H, PADDING_ROW, dtype=BFLOAT16))
        response.gemm2_output.CopyFrom(as_message(np.stack(out)))
        response.expanded_idx_to_permuted_idx.CopyFrom(as_message(index))

    def Forward(self, request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardResponse:  # noqa: N802
        self.metadata.append(dict(context.invocation_metadata()))
        try:
            return self.answer(request)
        except RefusedError as refused:
            context.set_trailing_metadata((("grpc-status-details-bin", refused.status.SerializeToString()),))
            context.abort(_code(refused.status.code), refused.status.message)
            raise AssertionError from None
        except BrokenStreamError:
            context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
            raise AssertionError from None

    def ForwardStream(  # noqa: N802
        self, request_iterator: Iterator[pb.ForwardStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ForwardStreamResponse]:
        self.metadata.append(dict(context.invocation_metadata()))
        self.streams += 1
        answers: queue.Queue[pb.ForwardStreamResponse | BrokenStreamError | None] = queue.Queue()
        threading.Thread(target=self._read, args=(request_iterator, answers), daemon=True).start()
        while (answer := answers.get(timeout=60)) is not None:
            if isinstance(answer, BrokenStreamError):
                context.abort(grpc.StatusCode.INTERNAL, "the process died")
            yield answer

    def _read(self, requests: Iterator[pb.ForwardStreamRequest], answers: queue.Queue[Any]) -> None:
        with ThreadPoolExecutor(max_workers=32) as pool:
            try:
                for request in requests:
                    self.timeouts_ms.append(request.timeout_ms)
                    pool.submit(self._stream_answer, request, answers)
            except grpc.RpcError:
                pass  # the client has left
        answers.put(None)

    def _stream_answer(self, request: pb.ForwardStreamRequest, answers: queue.Queue[Any]) -> None:
        answer = pb.ForwardStreamResponse(id=request.id)
        try:
            answer.response.CopyFrom(self.answer(request.request))
        except RefusedError as refused:
            status = refused.status
            answer.error.CopyFrom(pb.StreamError(code=status.code, message=status.message, details=status.details))
        except BrokenStreamError as broken:
            answers.put(broken)
            return
        answers.put(answer)

    def ListLayers(self, request: pb.ListLayersRequest, context: grpc.ServicerContext) -> pb.ListLayersResponse:  # noqa: N802
        return pb.ListLayersResponse(layers=[self.layer("a"), self.layer("b")])

    def GetLayer(self, request: pb.GetLayerRequest, context: grpc.ServicerContext) -> pb.GetLayerResponse:  # noqa: N802
        if request.layer not in ("a", "b"):
            context.abort(grpc.StatusCode.NOT_FOUND, f"no layer {request.layer!r}; there are a, b")
        return pb.GetLayerResponse(layer=self.layer(request.layer))

    def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        self.info_calls += 1
        return pb.GetServerInfoResponse(
            server_version="9", backend="cpu", max_batch_tokens=MAX_TOKENS, max_message_bytes=self.max_message_bytes
        )

    def layer(self, name: str) -> pb.LayerInfo:
        return pb.LayerInfo(
            name=name,
            hidden_size=self.hidden_size,
            intermediate_size=4,
            num_experts=E,
            local_expert_offset=FIRST,
            local_num_experts=LOCAL,
            top_k=K,
            routing_method=pb.ROUTING_METHOD_DEFAULT,
            activation=pb.ACTIVATION_SWIGLU,
            hidden_states_scale=self.scale,
            routing_bias=as_message(np.arange(E, dtype=np.float32)),
            weights_version=self.version,
            weights_versions=[self.version],
            state=pb.LAYER_STATE_READY,
        )


def _code(number: int) -> grpc.StatusCode:
    return grpc.StatusCode[code_pb2.Code.Name(number)]


class FakeServer:
    """A running fake service."""

    # NOTE: not localhost, which is two addresses: port 0 is free on the first, and may be another test's on the second.
    def __init__(self, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None) -> None:
        self.service = FakeService()
        self.health = health.HealthServicer()
        # With SO_REUSEPORT, gRPC's default, port 0 may be one where another test's server listens with it.
        self._grpc = grpc.server(ThreadPoolExecutor(max_workers=64), options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_ExpertServiceServicer_to_server(self.service, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._grpc)
        if credentials is None:
            self.port = self._grpc.add_insecure_port(address)
        else:
            self.port = self._grpc.add_secure_port(address, credentials)
        self.target = f"127.0.0.1:{self.port}"
        self._grpc.start()

    def stop(self) -> None:
        self._grpc.stop(None).wait(10)
