"""What a client needs to know: where the server is, how to trust it, and how long and how often to try."""

from __future__ import annotations

import math
import re
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Final, Literal

from expertd._arena import MIN_ARENA_BYTES
from expertd._seconds import check_seconds
from expertd.errors import ConfigError

__all__ = ["ClientConfig", "RetryPolicy"]

_MAX_INT32: Final = 2**31 - 1  # of an option of a gRPC channel
_METADATA_KEY: Final = re.compile(r"[0-9a-z_.-]+")
_METADATA_TEXT: Final = re.compile(r"[ -~]*")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} is {value}, expected a positive finite number")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}, expected at least {least}")


def _check_metadata(key: str, value: str | bytes) -> None:
    """Raise ConfigError unless gRPC can send it. The value may be a secret: it is not told."""
    if not _METADATA_KEY.fullmatch(key) or key.startswith("grpc-"):
        raise ConfigError(
            f"metadata key {key!r} cannot be sent, expected lower case letters, digits, '-', '_' and '.', and no "
            f"'grpc-' prefix"
        )
    if key.endswith("-bin"):
        if not isinstance(value, bytes):
            raise ConfigError(f"metadata value of {key!r} is a {type(value).__name__}, expected bytes for '-bin'")
        return
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    if not isinstance(text, str) or not _METADATA_TEXT.fullmatch(text):
        raise ConfigError(
            f"metadata value of {key!r} cannot be sent, expected printable ASCII without a line break; other bytes go "
            f"under a key that ends in '-bin'"
        )


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often a request that failed with UNAVAILABLE or RESOURCE_EXHAUSTED is sent again, always within its deadline.

    The wait before attempt n + 1 is uniform in 0 ... min(max_backoff_s, initial_backoff_s * multiplier ** (n - 1)),
    on top of the delay that the server asked for, if it did. Raises ConfigError, naming the option.
    """

    max_attempts: int = 6
    """Attempts in all, the first included; 1: never retry."""
    initial_backoff_s: float = 0.05
    max_backoff_s: float = 2.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        _at_least("max_attempts", self.max_attempts, 1)
        _positive("initial_backoff_s", self.initial_backoff_s)
        _positive("max_backoff_s", self.max_backoff_s)
        if self.max_backoff_s < self.initial_backoff_s:
            raise ConfigError(
                f"max_backoff_s is {self.max_backoff_s}, expected at least initial_backoff_s = {self.initial_backoff_s}"
            )
        if not (math.isfinite(self.multiplier) and self.multiplier >= 1):
            raise ConfigError(f"multiplier is {self.multiplier}, expected a finite number of at least 1")


@dataclass(frozen=True)
class ClientConfig:
    """Everything about a client. Raises ConfigError, naming the option, when a value makes no sense."""

    target: str
    """Address as gRPC takes it: "host:port", "dns:///name:port", "unix:/path/to/socket", "ipv4:10.0.0.1:80"."""
    _: KW_ONLY
    tls: bool = False
    """Encrypt, trusting the system's certificate authorities; implied by any of the certificate options."""
    ca_file: str | Path | None = None
    """PEM file of the certificate authorities to trust instead of the system's."""
    ca_pem: bytes | None = field(default=None, repr=False)
    """The same as bytes."""
    cert_file: str | Path | None = None
    """PEM file of the client's certificate chain, for mutual TLS; needs a key."""
    cert_pem: bytes | None = field(default=None, repr=False)
    """The same as bytes."""
    key_file: str | Path | None = None
    """PEM file of the client's private key."""
    key_pem: bytes | None = field(default=None, repr=False)
    """The same as bytes."""
    server_name: str | None = None
    """Name to expect in the server's certificate, where it differs from the target's."""
    metadata: tuple[tuple[str, str | bytes], ...] = field(default=(), repr=False)
    """Sent with every call and stream, for instance (("authorization", "Bearer …"),). Keys are lower case."""
    send_request_id: bool = False
    """Send a fresh x-request-id with every call and stream; errors carry it as `request_id`."""
    timeout_s: float = 30.0
    """Deadline of a call that gives none, retries included."""
    retry: RetryPolicy = RetryPolicy()
    """When and how often to try again."""
    transport: Literal["auto", "grpc", "shm", "stream", "unary"] = "auto"
    """How Forward travels. "auto": on open bidirectional streams, through memory that is shared with the server
    where that runs on this machine and takes it, else as bytes. "grpc" (also "stream"): on streams, always as
    bytes. "shm": as auto, but fail with SharedMemoryError where no memory can be shared. "unary": as one call for each
    request."""
    shared_memory_bytes: int = 256 * 1024 * 1024
    """Most memory to share with the server on each stream; the server may take less. Pages are taken when first needed,
    and kept as long as the stream is open; a request that finds no room goes as bytes. Arrays from `empty` take at most
    half of it."""
    num_channels: int = 1
    """Connections, with one stream each. More than one spreads a busy client over several server processes."""
    max_in_flight: int = 32
    """Most requests (parts, where a request is split) on the wire at a time; further ones wait for a place."""
    max_message_bytes: int = 256 * 1024 * 1024
    """Most bytes in one message, either way. gRPC's own default, 4 MiB, is too small for answers."""
    keepalive_time_s: float = 30.0
    """Ping an open connection that was silent for this long, so that a dead peer is noticed."""
    keepalive_timeout_s: float = 10.0
    """Give the connection up when a ping is not answered within this time."""

    def __post_init__(self) -> None:
        if not self.target:
            raise ConfigError("target is empty, expected an address such as 'localhost:50051'")
        for name in ("ca", "cert", "key"):
            if getattr(self, f"{name}_file") is not None and getattr(self, f"{name}_pem") is not None:
                raise ConfigError(f"{name}_file and {name}_pem are both given, expected at most one of them")
        if self._has("cert") != self._has("key"):
            given, missing = ("cert", "key") if self._has("cert") else ("key", "cert")
            raise ConfigError(f"a {given} is given without a {missing}; give {missing}_file or {missing}_pem too")
        if self.server_name is not None and not self.uses_tls:
            raise ConfigError(f"server_name is {self.server_name!r} without TLS; set tls=True or ca_file")
        for key, value in self.metadata:
            _check_metadata(key, value)
        if self.transport not in ("auto", "grpc", "shm", "stream", "unary"):
            raise ConfigError(f"transport is {self.transport!r}, expected 'auto', 'grpc', 'shm' or 'unary'")
        check_seconds("timeout_s", self.timeout_s)
        for name in ("keepalive_time_s", "keepalive_timeout_s"):
            check_seconds(name, getattr(self, name), _MAX_INT32 // 1000)
        _at_least("num_channels", self.num_channels, 1)
        _at_least("max_in_flight", self.max_in_flight, 1)
        _at_least("max_message_bytes", self.max_message_bytes, 64 * 1024)
        if self.max_message_bytes > _MAX_INT32:
            raise ConfigError(f"max_message_bytes is {self.max_message_bytes}, gRPC takes at most {_MAX_INT32}")
        _at_least("shared_memory_bytes", self.shared_memory_bytes, MIN_ARENA_BYTES)

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.tls or self._has("ca") or self._has("cert")

    def pem(self, name: Literal["ca", "cert", "key"]) -> bytes | None:
        """The PEM bytes of one certificate option, read from its file if need be; None where it is not given.

        Raises ConfigError naming the option when the file cannot be read.
        """
        path: str | Path | None = getattr(self, f"{name}_file")
        pem: bytes | None = getattr(self, f"{name}_pem")
        if path is None:
            return pem
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{name}_file {str(path)!r} cannot be read: {error.strerror}") from error

    def _has(self, name: str) -> bool:
        return getattr(self, f"{name}_file") is not None or getattr(self, f"{name}_pem") is not None
