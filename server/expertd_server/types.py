"""The vocabulary of the layer: routing methods, activations and the shape of a layer."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

__all__ = ["MAX_NUM_EXPERTS", "MAX_TOP_K", "Activation", "LayerSpec", "RoutingMethod"]

MAX_NUM_EXPERTS = 1024
MAX_TOP_K = 32


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

    @property
    def reads_bias(self) -> bool:
        """Whether a routing bias takes part in the selection; with any other method a bias is an error."""
        return self in (RoutingMethod.DEEPSEEK_V3, RoutingMethod.MINIMAX2)


class Activation(enum.IntEnum):
    """The activation between the two matrix products; the published ids of the operator's `activation_type`."""

    GELU = 0
    SWIGLU = 3
    GEGLU = 4
    RELU2 = 6
    IDENTITY = 7

    @property
    def is_gated(self) -> bool:
        """Whether gemm1_weights holds an up and a gate half: 2 * intermediate_size rows, not intermediate_size."""
        return self in (Activation.SWIGLU, Activation.GEGLU)


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Everything about a layer that is not a weight. Raises ValueError, naming the field, when it makes no sense."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    """Experts of the whole layer, over all servers."""
    top_k: int
    local_expert_offset: int = 0
    """Global id of the first expert held here."""
    local_num_experts: int | None = None
    """Experts held here; None: all of them (replaced by the number)."""
    routing_method: RoutingMethod = RoutingMethod.DEFAULT
    activation: Activation = Activation.SWIGLU
    n_group: int | None = None
    """Groups of DeepSeekV3 routing; None, 0 and 1 mean no grouping."""
    topk_group: int | None = None
    routed_scaling_factor: float | None = None
    """Read by DeepSeekV3 and MiniMax2 only; None means 1.0."""
    norm_topk_prob: bool = True
    """False: methods 4 and 6 do not divide by the sum of the selected scores."""
    use_routing_scales_on_input: bool = False
    """Multiply the first product by the routing weight and sum with weight 1 (Llama 4); top_k must be 1."""

    def __post_init__(self) -> None:
        if self.local_num_experts is None:
            object.__setattr__(self, "local_num_experts", self.num_experts - self.local_expert_offset)
        object.__setattr__(self, "routing_method", _routing_method(self.routing_method))
        object.__setattr__(self, "activation", _activation(self.activation))
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_experts > MAX_NUM_EXPERTS:
            raise ValueError(f"num_experts is {self.num_experts}, expected at most {MAX_NUM_EXPERTS}")
        if self.top_k > min(self.num_experts, MAX_TOP_K):
            raise ValueError(
                f"top_k is {self.top_k}, expected at most min(num_experts, {MAX_TOP_K}) = "
                f"{min(self.num_experts, MAX_TOP_K)}"
            )
        if self.local_expert_offset < 0:
            raise ValueError(f"local_expert_offset is {self.local_expert_offset}, expected at least 0")
        if self.num_local < 1 or self.local_expert_offset + self.num_local > self.num_experts:
            raise ValueError(
                f"local_num_experts is {self.num_local} at local_expert_offset {self.local_expert_offset}, expected a "
                f"slice of 1 or more experts inside 0 ... {self.num_experts - 1}"
            )
        if self.routing_method is RoutingMethod.LLAMA4 and self.top_k != 1:
            raise ValueError(f"top_k is {self.top_k}, routing method 3 (Llama4) needs top_k = 1")
        if self.use_routing_scales_on_input and self.top_k != 1:
            raise ValueError(f"top_k is {self.top_k}, use_routing_scales_on_input needs top_k = 1")
        if self.routed_scaling_factor is not None and not math.isfinite(self.routed_scaling_factor):
            raise ValueError(f"routed_scaling_factor is {self.routed_scaling_factor}, expected a finite number")
        self._check_groups()

    def _check_groups(self) -> None:
        for name in ("n_group", "topk_group"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0, or None")
        if not self.is_grouped:
            return
        n_group, topk_group = self.n_group or 0, self.topk_group
        if self.num_experts % n_group or self.num_experts // n_group < 2:
            raise ValueError(
                f"n_group is {n_group}, expected a divisor of num_experts {self.num_experts} that leaves at least 2 "
                f"experts a group"
            )
        if topk_group is None or not 1 <= topk_group <= n_group:
            raise ValueError(f"topk_group is {topk_group}, expected 1 to n_group = {n_group}")
        if self.top_k > topk_group * (self.num_experts // n_group):
            raise ValueError(
                f"top_k is {self.top_k}, but {topk_group} groups of {self.num_experts // n_group} experts hold only "
                f"{topk_group * (self.num_experts // n_group)}"
            )

    @property
    def num_local(self) -> int:
        """local_num_experts as a plain int."""
        assert self.local_num_experts is not None
        return self.local_num_experts

    @property
    def is_grouped(self) -> bool:
        """Whether DeepSeekV3 routing first picks groups of experts."""
        return self.routing_method is RoutingMethod.DEEPSEEK_V3 and self.n_group not in (None, 0, 1)

    @property
    def gemm1_rows(self) -> int:
        """M, the rows of one expert's gemm1_weights."""
        return (2 if self.activation.is_gated else 1) * self.intermediate_size

    @property
    def weights_nbytes(self) -> int:
        """Bytes of the FP8 weights of the experts held here."""
        return self.num_local * (self.gemm1_rows + self.intermediate_size) * self.hidden_size


def _routing_method(value: int) -> RoutingMethod:
    try:
        return RoutingMethod(value)
    except ValueError:
        raise ValueError(f"routing_method_type is {value}, expected one of {_choices(RoutingMethod)}") from None


def _activation(value: int) -> Activation:
    try:
        return Activation(value)
    except ValueError:
        raise ValueError(f"activation_type is {value}, expected one of {_choices(Activation)}") from None


def _choices(kind: type[enum.IntEnum]) -> str:
    return ", ".join(f"{member.value} ({member.name})" for member in kind)
