"""What goes into the client and what comes out of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = [
    "Activation",
    "Array",
    "ArrayT",
    "ForwardRequest",
    "ForwardResult",
    "LayerInfo",
    "LayerState",
    "LoadedVersion",
    "RoutingMethod",
    "ServerInfo",
    "SwappedVersion",
    "Timing",
    "UnloadedVersion",
]

Array: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"
"""A numpy array, or a torch tensor on any device."""

ArrayT = TypeVar("ArrayT", "np.ndarray[Any, Any]", "torch.Tensor")
"""Results come as the kind of array that hidden_states was."""

MaybeNone: TypeAlias = Any
"""None where the caller did not ask for the field; typed so that those who did ask need no assert."""


class RoutingMethod(enum.IntEnum):
    """How logits become expert ids and weights; the published ids of the operator's `routing_method_type`."""

    DEFAULT = 0
    RENORMALIZE = 1
    DEEPSEEK_V3 = 2
    LLAMA4 = 3
    RENORMALIZE_NAIVE = 4
    TOPK = 5
    SIGMOID_RENORM = 6
    MINIMAX2 = 7
    SIGMOID = 8


class Activation(enum.IntEnum):
    """The activation between the two matrix products; the published ids of the operator's `activation_type`."""

    GELU = 0
    SWIGLU = 3
    GEGLU = 4
    RELU2 = 6
    IDENTITY = 7


class LayerState(enum.Enum):
    """Whether a layer answers requests."""

    LOADING = "loading"
    READY = "ready"


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """What a server is, what it runs on and what it accepts."""

    server_version: str
    backend: str
    """"cpu", "torch" (any CUDA device), "cuda" (Hopper kernels) or "noop" (computes nothing)."""
    device: str
    """Device name as the driver or the operating system gives it."""
    max_batch_tokens: int
    """Most tokens in one request on the wire; the client splits larger ones."""
    max_message_bytes: int
    max_queue_tokens: int
    draining: bool
    """True once the server has begun to stop."""
    instance_id: str
    """Random for each start of the server."""
    max_region_bytes: int = 0
    """Most bytes of memory that it shares with one stream of a client on its machine; 0: none."""


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """A layer as the server holds it."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    """Experts of the whole layer, over all servers."""
    local_expert_offset: int
    """Global id of the first expert held by this server."""
    local_num_experts: int
    top_k: int
    routing_method: RoutingMethod
    activation: Activation
    n_group: int
    """Groups of DeepSeekV3 routing; 0: not grouped."""
    topk_group: int
    """Groups that stay; 0: not grouped."""
    routed_scaling_factor: float | None
    norm_topk_prob: bool
    use_routing_scales_on_input: bool
    hidden_states_scale: float | None
    """The server quantises other hidden states as fp8(x * hidden_states_scale); None: it takes FP8 only."""
    routing_bias: np.ndarray[Any, Any] | None
    """[num_experts] float32, read-only; None: no bias."""
    weights_version: int
    """Version that a request without weights_version gets."""
    weights_versions: tuple[int, ...]
    """Every version held, ascending."""
    weights_bytes: int
    state: LayerState
    weights_fingerprint: int = 0
    """Hash of weights_version's weights of these experts, the same on servers that loaded the same; 0: not known."""


@dataclass(frozen=True, kw_only=True)
class LoadedVersion:
    """A version of a layer's weights that a server holds now."""

    layer: LayerInfo
    """The layer with all its versions; its weights_version is the current one."""
    weights_bytes: int
    """Bytes of device memory (CPU backend: of RAM) that the loaded version takes."""
    load_time_s: float


@dataclass(frozen=True, kw_only=True)
class SwappedVersion:
    """A version that is the current one now."""

    layer: LayerInfo
    previous_weights_version: int
    """The version that was current before; held until it is unloaded."""


@dataclass(frozen=True, kw_only=True)
class UnloadedVersion:
    """A version, or a layer, that takes no requests any more."""

    weights_bytes: int
    """Bytes that it took."""
    freed: bool
    """Whether its memory is free; False: requests were in flight until the time was over, and the last of them will
    free it."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Where the time of one request went on the server, in microseconds, and in what company it ran."""

    queue_us: int
    copy_in_us: int
    compute_us: int
    copy_out_us: int
    batch_tokens: int
    """Tokens of the batch that the request ran in, its own included."""
    batch_requests: int
    queue_depth_tokens: int
    """Tokens still waiting in the server's queues when the answer was made."""

    @property
    def total_us(self) -> int:
        """Queue, copies and compute together."""
        return self.queue_us + self.copy_in_us + self.compute_us + self.copy_out_us


@dataclass(frozen=True, kw_only=True)
class ForwardRequest(Generic[ArrayT]):
    """One request of forward_many, or one to prepare; the fields are the arguments of forward. T num_tokens, H
    hidden_size, E num_experts.

    The arrays are read when the request is sent and again if it has to be sent again: leave them as they are until its
    result is there.
    """

    layer: str
    hidden_states: ArrayT
    """[T, H] float8_e4m3fn, or bfloat16, float16, float32 where the layer has a hidden_states_scale."""
    routing_logits: Array | None = None
    """[T, E] float32 or bfloat16: the server routes."""
    topk_ids: Array | None = None
    """[T, K] int32 global expert ids, -1 for an empty slot: the caller has routed. Needs topk_weights."""
    topk_weights: Array | None = None
    """[T, K] float32 or bfloat16."""
    output_dtype: Any = None
    """bfloat16 (also None), float32 or float16, as a name, a numpy dtype or a torch dtype."""
    do_finalize: bool = True
    """False: return the separate expert outputs instead of their weighted sum."""
    return_routing: bool = False
    """Also return topk_ids and expert_weights, the routing that was used."""
    weights_version: int | None = None
    """Exactly this version of the layer's weights; None: the current one."""
    timeout_s: float | None = None
    """Deadline, retries included; None: that of the client."""
    out: ArrayT | None = None
    """[T, H] in output_dtype: where to write the output. Contiguous, on the host, and apart from what is sent. Leave it
    alone until the result is there; its contents are undefined when the request fails."""


@dataclass(frozen=True, kw_only=True)
class ForwardResult(Generic[ArrayT]):
    """The layer's answer. T num_tokens, H hidden_size, K top_k.

    Arrays are of the same kind as hidden_states, torch tensors on the same device. Numpy arrays may be read-only views
    of the received message.
    """

    output: ArrayT | MaybeNone
    """[T, H] in output_dtype, the request's `out` itself where it had one; None when do_finalize is False."""
    gemm2_output: ArrayT | MaybeNone
    """[P, H] bfloat16, one row per (token, local expert) pair, grouped by expert; only when do_finalize is False."""
    expert_weights: ArrayT | MaybeNone
    """[T, K] bfloat16; when do_finalize is False or return_routing is True."""
    topk_ids: ArrayT | MaybeNone
    """[T, K] int32 global expert ids in slot order; when return_routing is True."""
    expanded_idx_to_permuted_idx: ArrayT | MaybeNone
    """[T * K] int32, row of gemm2_output for slot t * K + k, or -1 where the expert is not held by the server; only
    when do_finalize is False."""
    weights_version: int
    """Version of the weights that produced all of this answer."""
    timings: tuple[Timing, ...]
    """One for each part that the request was sent in; most requests have one."""

    @property
    def timing(self) -> Timing:
        """That of the slowest part."""
        return max(self.timings, key=lambda timing: timing.total_us)
