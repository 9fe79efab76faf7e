"""How fast a tier would be, what bounds it, and whether it is a good idea. Formulas alone: no files, no output.

Everything assumes even routing. A model's real routing is skewed: its hottest shard is slower than the mean.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch

from expertd_server.errors import ConfigError
from expertd_server.plan_figures import Figures, Gpu, KernelWork, Serving, weight_bytes_per_expert
from expertd_server.routing import route
from expertd_server.types import LayerSpec

__all__ = ["Bound", "Plan", "Question", "make_plan", "shards_per_token", "touched_experts"]

_USABLE_MEMORY = 0.9
"""Share of a GPU's memory that weights and workspace may take; the rest is the CUDA context, staging and graphs."""
_ID_AND_WEIGHT_BYTES = 6  # int32 and bfloat16, for each chosen expert
_SIMULATED_TOKENS = 8192
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Question:
    """A tier to predict. Raises ConfigError naming the option when a value cannot be used."""

    spec: LayerSpec
    """Of every layer, all experts local."""
    num_layers: int
    """MoE layers of the model."""
    gpu: str
    network_gbps: float
    """Gigabits per second that one host, server or worker, sends and receives at the same time."""
    tokens: int
    """In one step of all workers together: in decoding, the sequences."""
    shards: int | None = None
    """None: the fewest that fit into the GPUs' memory."""
    replicas: int = 1
    workers: int = 1
    """Attention hosts, each with a link of its own and one process that calls the tier."""
    frontends: int = 1
    """Processes on each server that serve the network; numbers that were not measured count as the next fewer one."""
    wire: Literal["fp8", "bf16"] = "fp8"
    """What hidden states are sent as; answers are bfloat16."""
    max_batch_tokens: int = 4096
    """Of each server; its workspace is sized for it."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "tokens", "replicas", "workers", "frontends", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.network_gbps < math.inf:
            raise ConfigError(f"network_gbps is {self.network_gbps}, expected a positive number")
        if self.shards is not None and not 1 <= self.shards <= self.spec.num_experts:
            raise ConfigError(f"shards is {self.shards}, expected 1 to the {self.spec.num_experts} experts of a layer")


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Tokens per second through all layers that one resource allows, when enough batches are in flight."""

    name: Literal["kernels", "network", "transport", "client"]
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to expect."""

    question: Question
    gpu: Gpu
    serving: Serving
    """Of a server, as measured."""
    more_frontends_measured: bool
    """Whether a server with more processes than these was measured."""
    shards: int
    min_shards: int
    """Fewest that fit into memory."""
    memory_bytes: int
    """Of the fullest server: weights of its experts in all layers, and the workspace of its largest batch."""
    shards_per_token: float
    """Expected number of servers that a token goes to."""
    sent_bytes: float
    """Per token and layer, from a worker to all servers."""
    received_bytes: float
    server_tokens: float
    """In the batch of one server, when the step's tokens come at once."""
    client_us: float
    exchange_us: float
    """gRPC on both hosts, without the network."""
    wire_us: float
    copies_us: float
    kernel_us: float
    local_us: float | None
    """The same step's layer on one GPU that holds all experts, without a network; None: they do not fit."""
    bounds: tuple[Bound, ...]

    @property
    def layer_us(self) -> float:
        """One step through one layer, nothing else in flight."""
        return self.client_us + self.exchange_us + self.wire_us + self.copies_us + self.kernel_us

    @property
    def step_ms(self) -> float:
        """One step through the MoE layers of the model; attention comes on top."""
        return self.layer_us * self.question.num_layers / 1e3

    @property
    def lockstep_tokens_per_s(self) -> float:
        """With one step in flight."""
        return self.question.tokens / self.step_ms * 1e3

    @property
    def bound(self) -> Bound:
        """The tightest one."""
        return min(self.bounds, key=lambda bound: bound.tokens_per_s)

    def tokens_per_s(self, name: str) -> float:
        """What one resource allows."""
        return next(bound.tokens_per_s for bound in self.bounds if bound.name == name)

    @property
    def local_tokens_per_s(self) -> float | None:
        """Of one GPU that holds all experts."""
        if self.local_us is None:
            return None
        return self.question.tokens / (self.local_us * self.question.num_layers) * 1e6

    @property
    def gbps_for_the_gpus(self) -> float:
        """Network per host at which it would no longer hold up the kernels."""
        return self.question.network_gbps * self.tokens_per_s("kernels") / self.tokens_per_s("network")

    @property
    def verdict(self) -> Literal["good", "limited", "bad"]:
        """bad: it does not fit, something leaves the GPUs idle more than half of the time, or the whole tier does no
        more than one GPU would alone. limited: something else than the GPUs is the bound, but not by that much."""
        local = self.local_tokens_per_s
        if (
            self.shards < self.min_shards
            or self.bound.tokens_per_s < self.tokens_per_s("kernels") / 2
            or (local is not None and self.bound.tokens_per_s <= local)
        ):
            return "bad"
        return "good" if self.bound.name == "kernels" else "limited"

    def reasons(self) -> list[str]:
        """Why, in sentences."""
        found: list[str] = []
        if self.shards < self.min_shards:
            found.append(
                f"{self.shards} shards do not fit into the memory of the GPUs: take {self.min_shards} or more."
            )
        kernels, network = self.tokens_per_s("kernels"), self.tokens_per_s("network")
        if network < kernels:
            found.append(
                f"The network carries {network:,.0f} tokens/s, the GPUs could compute {kernels:,.0f}: they are idle at "
                f"least {1 - network / kernels:.0%} of the time. It would take {self.gbps_for_the_gpus:,.0f} Gb/s."
            )
        serving = self.serving
        if self.question.frontends != serving.processes:
            found.append(
                f"{self.question.frontends} serving processes were not measured: each server counts as one with "
                f"{serving.processes}, which takes {serving.server_gbs:g} GB/s in and out together."
            )
        remedies = {
            "transport": "more front-end processes or replicas" if self.more_frontends_measured else "more replicas",
            "client": "more worker processes",
        }
        for name, remedy in remedies.items():
            if (rate := self.tokens_per_s(name)) < min(kernels, network):
                found.append(
                    f"The {name} allows {rate:,.0f} tokens/s, less than GPUs and network: {remedy} would help."
                )
        local = self.local_tokens_per_s
        if local is not None:
            found.append(
                f"All experts fit into one {self.gpu.gpu}, which would do {local:,.0f} tokens/s without a network, at "
                f"{self.local_us:,.0f} µs a layer instead of {self.layer_us:,.0f}."
            )
        waiting = 1 - self.kernel_us / self.layer_us
        found.append(
            f"Of the {self.layer_us:,.0f} µs that a layer takes, {waiting:.0%} are not kernels: one step at a time "
            f"makes {self.lockstep_tokens_per_s:,.0f} tokens/s; overlap steps to come near the bound."
        )
        return found


def shards_per_token(spec: LayerSpec, shards: int) -> float:
    """Expected number of distinct slices among a token's top_k experts; spec: of the whole layer.

    Without groups every set of experts is equally likely: for each slice of n, 1 - C(E - n, K) / C(E, K). Grouped
    routing is simulated with the router itself on random logits, because groups with high scores draw more experts.
    """
    edges = [shard * spec.num_experts // shards for shard in range(shards + 1)]
    if not spec.is_grouped:
        ways = math.comb(spec.num_experts, spec.top_k)
        sizes = [stop - start for start, stop in itertools.pairwise(edges)]
        return sum(1 - math.comb(spec.num_experts - size, spec.top_k) / ways for size in sizes)
    generator = torch.Generator().manual_seed(_SEED)
    logits = torch.randn(_SIMULATED_TOKENS, spec.num_experts, generator=generator)
    ids, _ = route(spec, logits, torch.zeros(spec.num_experts))
    needed = torch.zeros(_SIMULATED_TOKENS, shards, dtype=torch.bool)
    needed.scatter_(1, torch.bucketize(ids.long(), torch.tensor(edges[1:]), right=True), True)
    return int(needed.sum()) / _SIMULATED_TOKENS


def touched_experts(spec: LayerSpec, experts: int, tokens: float) -> float:
    """Expected number of `experts` that at least one of so many tokens chooses: each does with probability K / E."""
    untouched: float = (1 - spec.top_k / spec.num_experts) ** tokens
    return experts * (1 - untouched)


def make_plan(question: Question, figures: Figures) -> Plan:
    """Answer a question. Raises ConfigError for a GPU without figures."""
    spec, gpu, transport = question.spec, figures.gpu(question.gpu), figures.transport
    serving = transport.serving(question.frontends)
    budget = _USABLE_MEMORY * gpu.memory_bytes
    min_shards = next(
        (n for n in range(1, spec.num_experts + 1) if _memory_bytes(question, n) <= budget), spec.num_experts + 1
    )
    shards = min(min_shards, spec.num_experts) if question.shards is None else question.shards
    servers = shards * question.replicas
    spread = shards_per_token(spec, shards)
    hidden_bytes = spec.hidden_size * (1 if question.wire == "fp8" else 2)
    # The weights and ids of all K slots go to each server; those of other servers' experts are empty.
    sent_bytes = spread * (hidden_bytes + _ID_AND_WEIGHT_BYTES * spec.top_k)
    received_bytes = spread * 2 * spec.hidden_size

    replica_tokens = question.tokens / question.replicas
    server_tokens = replica_tokens * spread / shards
    kernel_us = gpu.kernels.layer_us(
        KernelWork.of(
            spec,
            tokens=server_tokens,
            rows=replica_tokens * spec.top_k / shards,
            touched=touched_experts(spec, math.ceil(spec.num_experts / shards), replica_tokens),
        )
    )
    local_us = None
    if min_shards == 1:
        touched = touched_experts(spec, spec.num_experts, question.tokens)
        work = KernelWork.of(spec, tokens=question.tokens, rows=question.tokens * spec.top_k, touched=touched)
        local_us = gpu.kernels.layer_us(work)

    byte_us = 8e-3 / question.network_gbps
    links = min(question.workers, servers)  # both sides carry the same bytes: the fewer links are the narrower side
    worker_tokens = question.tokens / question.workers
    both_bytes = sent_bytes + received_bytes
    client_us = figures.client.call_us + figures.client.value_ns * worker_tokens * spread * spec.hidden_size / 1e3
    server_bytes_per_us = serving.server_gbs * 1e3
    exchange_us = max(
        serving.exchange_us + serving.exchange_byte_ns * worker_tokens * both_bytes / shards / 1e3,
        question.tokens * both_bytes / servers / server_bytes_per_us,  # a server takes all workers' requests at once
    )
    copies_us = transport.copies_us + transport.copies_byte_ns * question.tokens * both_bytes / servers / 1e3

    per_second = {
        "kernels": question.tokens / kernel_us * 1e6,
        "network": links / (max(sent_bytes, received_bytes) * byte_us) * 1e6,
        "transport": servers * server_bytes_per_us * 1e6 / both_bytes,
        "client": question.workers * worker_tokens / client_us * 1e6,
    }
    return Plan(
        question=question,
        gpu=gpu,
        serving=serving,
        more_frontends_measured=serving is not transport.servings[-1],
        shards=shards,
        min_shards=min_shards,
        memory_bytes=_memory_bytes(question, shards),
        shards_per_token=spread,
        sent_bytes=sent_bytes,
        received_bytes=received_bytes,
        server_tokens=server_tokens,
        client_us=client_us,
        exchange_us=exchange_us,
        wire_us=question.tokens * both_bytes * byte_us / links,
        copies_us=copies_us,
        kernel_us=kernel_us,
        local_us=local_us,
        bounds=tuple(
            Bound(name=name, tokens_per_s=rate / question.num_layers)  # type: ignore[arg-type]
            for name, rate in per_second.items()
        ),
    )


def _memory_bytes(question: Question, shards: int) -> int:
    spec = question.spec
    weights = question.num_layers * math.ceil(spec.num_experts / shards) * weight_bytes_per_expert(spec)
    # For each row the activated values, FP8, and the second product's, bfloat16, as if all experts were local.
    workspace = question.max_batch_tokens * spec.top_k * (spec.intermediate_size + 2 * spec.hidden_size)
    return weights + workspace
