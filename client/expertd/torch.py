"""Remote experts as a torch module, and as a drop-in for those of Hugging Face transformers models.

    import expertd
    from expertd.torch import remote_experts

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B")
    with expertd.ExpertGroup(["experts-0:50051", "experts-1:50051"]) as group:
        remote_experts(model, group)
        model.generate(**inputs)

Attention, router and shared experts stay where they are; the experts' weights leave the model. Inference only.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from expertd.errors import ConfigError, InvalidRequestError, VersionNotHeldError
from expertd.types import Activation, ForwardResult, LayerInfo

__all__ = ["ExpertLayers", "RemoteExperts", "remote_experts"]

_FP8_MAX = 448.0
_WIRE_DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32)

_ARGUMENTS = ["hidden_states", "top_k_index", "top_k_weights"]
"""Of the forward of every experts module in transformers 5 that stands between a router and a sum."""
_IMPLEMENTATION = "expertd"
"""Our name in transformers' registry of experts functions."""
_INDEXED_LAYER = re.compile(r"(?:^|\.)layers\.\d+$")

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.GELU: torch.nn.functional.gelu,
    Activation.SWIGLU: torch.nn.functional.silu,
    Activation.GEGLU: torch.nn.functional.gelu,
    Activation.RELU2: lambda x: torch.relu(x).square(),
    Activation.IDENTITY: lambda x: x,
}
_GATED = (Activation.SWIGLU, Activation.GEGLU)


class ExpertLayers(Protocol):
    """What serves the layers: a Client, an ExpertGroup, or anything else with these methods of theirs."""

    def forward(
        self,
        layer: str,
        hidden_states: torch.Tensor,
        *,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        output_dtype: torch.dtype,
        weights_version: int | None,
    ) -> ForwardResult[torch.Tensor]:
        """See Client.forward."""

    def layer(self, name: str) -> LayerInfo:
        """See Client.layer."""

    def layers(self) -> list[LayerInfo]:
        """See Client.layers."""


class RemoteExperts(torch.nn.Module):
    """The experts of one layer, on a server; without parameters of its own. H hidden_size, K top_k."""

    def __init__(self, layers: ExpertLayers, layer: str, *, wire_dtype: torch.dtype | None = None) -> None:
        """Asks what the layer is.

        layers: a Client or an ExpertGroup, which stays the caller's to close. layer: its name there.
        wire_dtype: in what dtype hidden states are sent. None: as they are, and the server quantises them.
        torch.float8_e4m3fn: quantised here, to the same values, which halves the bytes of bfloat16.
        Raises ConfigError when the layer cannot be used so, and what `layer` of a Client raises.
        """
        super().__init__()
        if wire_dtype is not None and wire_dtype not in _WIRE_DTYPES:
            expected = ", ".join(map(str, _WIRE_DTYPES))
            raise ConfigError(f"wire_dtype is {wire_dtype}, expected None or one of {expected}")
        self._layers = layers
        self.wire_dtype = wire_dtype
        self.info = _checked(layers.layer(layer))
        """The layer as it was when it was asked for last."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs. T num_tokens.

        hidden_states: [T, H] bfloat16, float16 or float32. top_k_index: [T, K] global expert ids, -1 for an empty slot,
        any integer dtype. top_k_weights: [T, K] of any float dtype, rounded to bfloat16 by the server.
        Returns [T, H] of the dtype and on the device of hidden_states. Raises ExpertdError: see `expertd.errors`.
        """
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            raise InvalidRequestError.of(
                "hidden_states" if hidden_states.requires_grad else "top_k_weights",
                "requires a gradient, which does not come back from remote experts; "
                "run the model under torch.inference_mode() or torch.no_grad()",
            )
        is_exact = top_k_weights.dtype in (torch.bfloat16, torch.float32)
        routing = {
            "topk_ids": top_k_index.to(torch.int32),
            "topk_weights": top_k_weights if is_exact else top_k_weights.float(),
            "output_dtype": hidden_states.dtype,
        }
        if self.wire_dtype is not torch.float8_e4m3fn:
            sent = hidden_states if self.wire_dtype is None else hidden_states.to(self.wire_dtype)
            return self._output(sent, routing, None)
        try:
            return self._output(self._quantized(hidden_states), routing, self.info.weights_version)
        except VersionNotHeldError:  # newer weights have come, and a new scale with them
            self.info = _checked(self._layers.layer(self.info.name))
            return self._output(self._quantized(hidden_states), routing, self.info.weights_version)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{self.info.name!r}, hidden_size={self.info.hidden_size}, num_experts={self.info.num_experts}"

    def _quantized(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # NOTE: the scale belongs to one version of the weights, so such a request has to name that version.
        assert self.info.hidden_states_scale is not None, "_checked"
        scaled = hidden_states.float() * self.info.hidden_states_scale
        return scaled.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)

    def _output(self, hidden_states: torch.Tensor, routing: dict[str, Any], version: int | None) -> torch.Tensor:
        result = self._layers.forward(self.info.name, hidden_states, weights_version=version, **routing)
        output: torch.Tensor = result.output
        return output


@dataclass(frozen=True)
class _Found:
    """A place in a model where experts are."""

    path: str
    """Of the experts module, such as "model.layers.3.mlp.experts"."""
    parent: torch.nn.Module
    attribute: str
    """Of the parent."""
    module: torch.nn.Module

    @property
    def layer(self) -> str:
        """The path down to the layer's number: "model.layers.3"; "" where there is none."""
        parts = self.path.split(".")
        stops = [n for n in range(2, len(parts)) if _INDEXED_LAYER.search(".".join(parts[:n]))]
        return ".".join(parts[: stops[-1]]) if stops else ""


def remote_experts(
    model: torch.nn.Module,
    layers: ExpertLayers,
    names: Sequence[str] | None = None,
    *,
    wire_dtype: torch.dtype | None = None,
) -> list[str]:
    """Let a Hugging Face transformers model (version 5) compute its experts remotely, and free their weights.

    layers: a Client or an ExpertGroup, to be closed by the caller when the model is done with.
    names: which layers, by their path in the model ("model.layers.3"); None: every one that has experts.
    wire_dtype: as in RemoteExperts.
    A model's layer is served by the server's layer of the same name, or else by the only one that ends in the same
    "layers.N". Returns the names of the server's layers, in the order of the model. There is no way back but to load
    the model again.
    Raises ConfigError, and leaves the model as it was, when it has no experts that can be replaced, when a layer is
    served by nobody, or when what is served has another shape, top_k or activation.
    """
    found = _find(model, names)
    held = {info.name: info for info in layers.layers()}
    modules: list[RemoteExperts] = []
    problems: list[str] = []
    for place in found:
        try:
            name = _served_name(place, held)
            _check_same(place, held[name], model)
            modules.append(RemoteExperts(layers, name, wire_dtype=wire_dtype))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    for place, remote in zip(found, modules, strict=True):
        _install(place, remote)
    return [remote.info.name for remote in modules]


def _checked(info: LayerInfo) -> LayerInfo:
    """A layer that takes what experts modules are given. Raises ConfigError."""
    if info.hidden_states_scale is None:
        raise ConfigError(
            f"layer {info.name!r} has no hidden_states_scale, so that hidden states cannot be quantised for it; serve "
            f"it from a checkpoint with input scales, or with a calibration file"
        )
    if info.use_routing_scales_on_input:
        raise ConfigError(
            f"layer {info.name!r} multiplies its input by the routing weights (Llama 4), experts modules their output"
        )
    return info


def _find(model: torch.nn.Module, names: Sequence[str] | None) -> list[_Found]:
    found: list[_Found] = []
    for parent_path, parent in model.named_modules():
        for attribute, module in parent.named_children():
            parameters = list(inspect.signature(module.forward).parameters)
            if parameters[: len(_ARGUMENTS)] == _ARGUMENTS and not isinstance(module, RemoteExperts):
                path = f"{parent_path}.{attribute}" if parent_path else attribute
                found.append(_Found(path, parent, attribute, module))
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no MoE block to replace; looked in its {sum(1 for _ in model.modules())} "
            f"modules for experts whose forward takes ({', '.join(_ARGUMENTS)}), as those of transformers 5 do"
        )
    if names is None:
        return found
    there = [place.layer for place in found]
    for name in names:
        if name not in there:
            raise ConfigError(f"layers names {name!r}, which has no experts in the model; expected {', '.join(there)}")
    return [place for place in found if place.layer in names]


def _served_name(place: _Found, held: dict[str, LayerInfo]) -> str:
    if place.layer in held:
        return place.layer
    # Checkpoints may call the trunk otherwise than the model's class does: backbone.layers.3, language_model.layers.3.
    tail = ".".join(place.layer.split(".")[-2:])
    alike = [name for name in held if place.layer and (name == tail or name.endswith(f".{tail}"))]
    if len(alike) != 1:
        raise ConfigError(
            f"{place.path}: expected one served layer called {place.layer!r} or ending in {tail!r}, found "
            f"{', '.join(alike or held) or 'none'}"
        )
    return alike[0]


def _check_same(place: _Found, info: LayerInfo, model: torch.nn.Module) -> None:
    """Raise ConfigError unless the served layer computes what the module computes."""
    module = place.module
    for extra in ("has_bias", "has_post_expert_norm", "_is_expert_parallel"):
        if getattr(module, extra, False):
            raise ConfigError(f"{place.path}: {extra.removeprefix('_')} is set, which a served layer does not compute")
    if _has_own_gate(module):
        raise ConfigError(
            f"{place.path}: {type(module).__name__} joins gate and up in a way of its own, which a served layer does "
            f"not compute"
        )
    down = getattr(module, "down_proj", None)
    if not isinstance(down, torch.Tensor) or down.ndim != 3:
        raise ConfigError(f"{place.path}: expected the experts' weights stacked in down_proj [E, H, I], found {down!r}")
    num_experts, *sizes = down.shape
    hidden_size, intermediate_size = reversed(sizes) if getattr(module, "is_transposed", False) else sizes
    router = [child for child in place.parent.children() if isinstance(getattr(child, "top_k", None), int)]
    config = getattr(module, "config", getattr(model, "config", None))
    top_k = router[0].top_k if router else getattr(config, "num_experts_per_tok", info.top_k)
    checks = {
        "num_experts": (info.num_experts, num_experts),
        "hidden_size": (info.hidden_size, hidden_size),
        "intermediate_size": (info.intermediate_size, intermediate_size),
        "top_k": (info.top_k, top_k),
        "gating": (info.activation in _GATED, getattr(module, "has_gate", hasattr(module, "gate_up_proj"))),
    }
    wrong = [f"{name} is {served}, the model's {own}" for name, (served, own) in checks.items() if served != own]
    activation = getattr(module, "act_fn", None)
    probe = torch.linspace(-4, 4, 33)
    if callable(activation) and not torch.allclose(activation(probe), _ACTIVATIONS[info.activation](probe), atol=1e-6):
        wrong.append(f"activation is {info.activation.name.lower()}, the model's {type(activation).__name__}")
    if wrong:
        raise ConfigError(f"{place.path} cannot be served by layer {info.name!r}: {'; '.join(wrong)}")


def _has_own_gate(module: torch.nn.Module) -> bool:
    gate = getattr(type(module), "_apply_gate", None)
    return gate is not None and gate.__name__ != "_default_apply_gate"


def _install(place: _Found, remote: RemoteExperts) -> None:
    """Put remote experts into a model: through transformers' experts interface where the module asks one."""
    module = place.module
    wrapped = inspect.unwrap(type(module).forward) is not type(module).forward
    interface = inspect.getclosurevars(type(module).forward).nonlocals.get("experts_interface") if wrapped else None
    if interface is None:
        setattr(place.parent, place.attribute, remote)
        return
    interface.register(_IMPLEMENTATION, _run_remotely)
    # NOTE: a config of its own: layers share one, and not all of them may be remote.
    config: Any = copy.deepcopy(module.config)
    config._experts_implementation = _IMPLEMENTATION
    module.config = config
    for name in list(module._parameters):
        module.register_parameter(name, None)
    for name in list(module._modules):
        delattr(module, name)
    module.remote = remote


def _run_remotely(module: Any, *arguments: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
    """An experts function of transformers: calls what `_install` put into the module."""
    output: torch.Tensor = module.remote(*arguments, **named)
    return output
