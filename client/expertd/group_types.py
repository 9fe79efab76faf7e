"""What goes into a group of servers and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal

import numpy as np

from expertd._seconds import check_seconds
from expertd.config import ClientConfig
from expertd.errors import ConfigError
from expertd.types import ArrayT, ForwardResult, Timing

__all__ = ["GroupConfig", "GroupResult", "PartReport"]


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Everything about a group but its targets. Raises ConfigError, naming the option, when a value makes no sense."""

    client: Callable[[str], ClientConfig] = ClientConfig
    """Makes the configuration of the connection to one address, for instance
    functools.partial(ClientConfig, ca_file="ca.pem"). Where it gives no server_name, an address that was found under a
    host name is expected to have a certificate of that name. Its retries are not used: a group tries another server
    instead."""
    timeout_s: float = 30.0
    """Deadline of a call that gives none."""
    mode: Literal["routed", "broadcast"] = "routed"
    """Send each token only to the servers that hold experts it chose, or everything to all (to compare)."""
    partial_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """In what type servers send their parts of the sum. float32 doubles the bytes that come back. auto: bfloat16 for a
    caller who wants bfloat16, otherwise float32."""
    allow_partial: bool = False
    """Answer without the experts that no server answered for, and say which, instead of failing."""
    attempt_timeout_s: float = 10.0
    """Ask another server when one has not answered within this time, or within half of what is left."""
    no_replica_timeout_s: float = 5.0
    """Go on trying for this long when all servers of a slice fail, before NoReplicaError."""
    initial_backoff_s: float = 0.02
    """Pause before all servers of a slice are tried again; doubles each time."""
    max_backoff_s: float = 0.5
    hedge_percentile: float | None = 0.95
    """Ask a second server when the first takes longer than this share of recent answers; None: never."""
    hedge_share: float = 0.1
    """Most hedged requests, as a share of all."""
    hedge_burst: int = 32
    """Hedges that may come at once, before their share counts: a server that hangs holds up many requests."""
    min_hedge_delay_s: float = 0.002
    max_failures: int = 3
    """Failures in a row after which a server gets no requests until a probe and a trial succeed."""
    refresh_interval_s: float = 1.0
    """How often the targets are resolved and every server is asked how it is and what it holds."""
    probe_timeout_s: float = 1.0
    """How long a server may take to say so before that counts as a failure; and how long targets may take to be
    resolved, before the group goes on with the addresses that it knows."""

    def __post_init__(self) -> None:
        for name in (
            "timeout_s",
            "attempt_timeout_s",
            "no_replica_timeout_s",
            "initial_backoff_s",
            "max_backoff_s",
            "probe_timeout_s",
            "refresh_interval_s",
        ):
            check_seconds(name, getattr(self, name))
        if self.mode not in ("routed", "broadcast"):
            raise ConfigError(f"mode is {self.mode!r}, expected 'routed' or 'broadcast'")
        if self.partial_dtype not in ("auto", "bfloat16", "float32"):
            raise ConfigError(f"partial_dtype is {self.partial_dtype!r}, expected 'auto', 'bfloat16' or 'float32'")
        if self.hedge_percentile is not None and not 0 < self.hedge_percentile <= 1:
            raise ConfigError(f"hedge_percentile is {self.hedge_percentile}, expected more than 0, at most 1, or None")
        if not 0 <= self.hedge_share <= 1:
            raise ConfigError(f"hedge_share is {self.hedge_share}, expected 0 to 1")
        if self.hedge_burst < 1:
            raise ConfigError(
                f"hedge_burst is {self.hedge_burst}, expected at least 1; to never hedge, set hedge_percentile to None"
            )
        if not (math.isfinite(self.min_hedge_delay_s) and self.min_hedge_delay_s >= 0):
            raise ConfigError(f"min_hedge_delay_s is {self.min_hedge_delay_s}, expected 0 or a positive finite number")
        if self.max_failures < 1:
            raise ConfigError(f"max_failures is {self.max_failures}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """What became of one part of a request."""

    experts: range
    """The slice of global expert ids that it was for."""
    num_tokens: int
    replica: str | None
    """Address of the server whose answer was used; None: nobody answered, and the result lacks it."""
    num_attempts: int
    """How often it was put on the wire."""
    timing: Timing | None
    """Where the server's time went; None without an answer."""


@dataclass(frozen=True, kw_only=True)
class GroupResult(ForwardResult[ArrayT], Generic[ArrayT]):
    """A layer's answer, put together from the parts of several servers, and how it came about.

    topk_ids and expert_weights are the routing that was used, if return_routing was set. timings has one entry for each
    part, in ascending order of the experts.
    """

    sent_bytes: int
    """Bytes of the request messages, hedges and failovers included, gRPC's framing (a few bytes each) not."""
    received_bytes: int
    """Bytes of the response messages that came, failovers' and hedges' included, until the last one that was needed.
    In both, tensors that went through shared memory count as if they had been in the messages."""
    parts: tuple[PartReport, ...]
    missing_experts: tuple[range, ...]
    """Slices of global expert ids that were chosen but not answered for; empty unless allow_partial was set."""
    missing_slots: np.ndarray[Any, np.dtype[np.bool_]] | None
    """[T, K] bool, True where the chosen expert is not in the sum; None when nothing is missing."""

    @property
    def is_partial(self) -> bool:
        """Whether anything is missing."""
        return self.missing_slots is not None
