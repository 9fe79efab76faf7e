"""Every error that this package raises on purpose, by what the caller should do about it.

ExpertdServerError
├── InvalidArgumentError     fix the request: names each offending field
├── LayerNotFoundError       ask ListLayers
├── VersionNotHeldError      ask for a version that is held, or for none
├── VersionConflictError     an order that does not fit the versions held: the message says what to do first
├── SharedMemoryOffError     send the tensors' bytes, or have the server share memory
├── AdminNotHereError        turn the admin methods on, or send orders where they are answered
├── OverloadedError          come back after retry_delay_s
├── UnavailableError         starting or draining: try another server, or come back
├── RequestTimeoutError      the deadline passed before the request was computed
├── RequestCancelledError    the caller left before the request was computed
├── BackendError             the device failed; this batch is lost, the next may do
├── CheckpointError          fix the checkpoint: names the tensor
└── ConfigError              fix the option: names it
    └── InsufficientMemoryError  free memory, or load less

`code` is the name of a google.rpc.Code and `reason` the stable machine-readable word of google.rpc.ErrorInfo; the
service maps them to gRPC, nothing else has to know about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

__all__ = [
    "AdminNotHereError",
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "ExpertdServerError",
    "FieldViolation",
    "InsufficientMemoryError",
    "InvalidArgumentError",
    "LayerNotFoundError",
    "OverloadedError",
    "RequestCancelledError",
    "RequestTimeoutError",
    "SharedMemoryOffError",
    "UnavailableError",
    "VersionConflictError",
    "VersionNotHeldError",
]


class ExpertdServerError(Exception):
    """Root of the tree."""

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"
    metadata: Mapping[str, str] = MappingProxyType({})
    """Figures for programs, in google.rpc.ErrorInfo."""


@dataclass(frozen=True)
class FieldViolation:
    """One thing wrong with a request: `field` is a path such as `hidden_states.shape`."""

    field: str
    description: str


class InvalidArgumentError(ExpertdServerError, ValueError):
    """The request cannot be served as it is.

    violations: at least one; the message joins them, so that it is useful without the details.
    """

    code = "INVALID_ARGUMENT"
    reason = "INVALID_ARGUMENT"

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))

    @classmethod
    def of(cls, field: str, description: str) -> InvalidArgumentError:
        """The common case of one violation."""
        return cls([FieldViolation(field, description)])


class LayerNotFoundError(ExpertdServerError, LookupError):
    """No layer of that name is held here."""

    code = "NOT_FOUND"
    reason = "LAYER_NOT_FOUND"


class VersionNotHeldError(ExpertdServerError, LookupError):
    """The layer is held, but not in the asked version of its weights."""

    code = "FAILED_PRECONDITION"
    reason = "WEIGHTS_VERSION_NOT_HELD"


class VersionConflictError(ExpertdServerError):
    """An order that does not fit the versions that are held."""

    code = "FAILED_PRECONDITION"
    reason = "VERSION_CONFLICT"


class SharedMemoryOffError(ExpertdServerError):
    """This server takes no memory of its callers."""

    code = "FAILED_PRECONDITION"
    reason = "SHARED_MEMORY_OFF"


class AdminNotHereError(ExpertdServerError):
    """AdminService is off, or answered on another address."""

    code = "PERMISSION_DENIED"
    reason = "ADMIN_NOT_HERE"


class OverloadedError(ExpertdServerError):
    """The queue is full. retry_delay_s: when to come back."""

    code = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_FULL"

    def __init__(self, message: str, retry_delay_s: float) -> None:
        self.retry_delay_s = retry_delay_s
        super().__init__(message)


class UnavailableError(ExpertdServerError):
    """The server or the layer does not answer at present: it starts, or it drains.

    retry_delay_s: when to come back; None: this server does not expect to answer again.
    """

    code = "UNAVAILABLE"
    reason = "NOT_SERVING"

    def __init__(self, message: str, retry_delay_s: float | None = None) -> None:
        self.retry_delay_s = retry_delay_s
        super().__init__(message)


class RequestTimeoutError(ExpertdServerError, TimeoutError):
    """The deadline passed while the request waited; it was not computed."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"

    @classmethod
    def before_computing(cls, waited_s: float) -> RequestTimeoutError:
        """Of a request that had waited so long by then."""
        return cls(
            f"the deadline passed after {waited_s:.3f} s, before the request was computed; allow more time or try "
            f"another server"
        )


class RequestCancelledError(ExpertdServerError):
    """The caller left while the request waited; it was not computed."""

    code = "CANCELLED"
    reason = "CANCELLED"


class BackendError(ExpertdServerError, RuntimeError):
    """The device or a kernel failed."""

    code = "INTERNAL"
    reason = "BACKEND_FAILED"


class CheckpointError(ExpertdServerError, ValueError):
    """A checkpoint cannot be served as it is; the message names the tensor or the config key."""

    code = "FAILED_PRECONDITION"
    reason = "BAD_CHECKPOINT"


class ConfigError(ExpertdServerError, ValueError):
    """An option has a value that cannot be used; the message names the option."""

    code = "INVALID_ARGUMENT"
    reason = "BAD_CONFIG"


class InsufficientMemoryError(ConfigError):
    """Weights do not fit beside what is held.

    needed_bytes: of the weights to hold; free_bytes: what there is for them.
    """

    code = "FAILED_PRECONDITION"
    reason = "INSUFFICIENT_MEMORY"

    def __init__(self, message: str, *, needed_bytes: int, free_bytes: int) -> None:
        self.metadata = {"needed_bytes": str(needed_bytes), "free_bytes": str(free_bytes)}
        super().__init__(message)
