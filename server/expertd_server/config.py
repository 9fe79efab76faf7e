"""The options of a server. Each is declared once, here: flags, environment names and documentation derive from it.

`python -m expertd_server.config` prints the table of docs/configuration.md.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import ipaddress
import os
import re
import textwrap
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Final

from expertd_server.errors import ConfigError

__all__ = [
    "ENV_PREFIX",
    "LARGEST_BLOCK_OVERHEAD_BYTES",
    "Config",
    "add_flags",
    "command_line",
    "config_from",
    "markdown_table",
]

ENV_PREFIX: Final = "EXPERTD_"

_LAYERS: Final = "layers"
_NETWORK: Final = "network"
_TLS: Final = "TLS"
_BATCHING: Final = "batching and limits"
_SHARED_MEMORY: Final = "shared memory"
_PROCESSES: Final = "processes"
_ADMIN: Final = "administration"
_OPERATION: Final = "operation"

_LOG_LEVELS: Final = ("debug", "info", "warning", "error")
_LOG_FORMATS: Final = ("text", "json")


def _in(group: str, metavar: str | None = None, choices: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Metadata of an option: the group it is documented in, and what stands for its value."""
    return {"group": group, "metavar": metavar, "choices": choices}


_DEVICE: Final = re.compile(r"auto|cpu|cuda(:\d+)?|noop")  # noop: for benchmarks alone, see backend_noop

LARGEST_BLOCK_OVERHEAD_BYTES: Final = 65536
"""More than a request or its answer takes in shared memory beyond the bytes of its message; see blocks."""

_UINT32_MAX: Final = 2**32 - 1
_UNBOUNDED: Final = 2**63 - 1
_MAX_FRONTEND_REQUESTS: Final = 65536
_MAX_SECONDS: Final = 10**9
"""Python waits ten times as long at most, and raises where it shall wait longer."""

_RANGES: Final = {
    "port": (0, 65535),
    "metrics_port": (0, 65535),
    "admin_port": (0, 65535),
    "synthetic_layers": (1, _UNBOUNDED),
    "synthetic_seed": (0, _UNBOUNDED),
    "weights_version": (1, _UNBOUNDED),
    "memory_budget_bytes": (1, _UNBOUNDED),
    "max_message_bytes": (1, 2**31 - 1),  # gRPC counts a message's bytes in 32 bits
    "max_batch_tokens": (1, _UINT32_MAX),
    "max_queue_requests": (1, _UNBOUNDED),
    "max_queue_delay_us": (0, _UNBOUNDED),
    "max_graph_tokens": (0, _UINT32_MAX),
    "max_streams": (1, 4096),
    "max_stream_requests": (1, _UNBOUNDED),
    "max_stream_answer_bytes": (1, _UNBOUNDED),
    "max_unary_requests": (1, 4096),
    "max_region_bytes": (4096, _UNBOUNDED),
    "max_pinned_bytes": (0, _UNBOUNDED),
    "frontends": (0, 64),
    "frontend_arena_bytes": (1, _UNBOUNDED),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `expertd-server serve`. Raises ConfigError, naming the option, when a value cannot be used."""

    checkpoint: Path | None = field(default=None, metadata=_in(_LAYERS, "PATH"))
    """Serve the MoE layers of this checkpoint: a directory or one .safetensors file with its config.json beside it."""
    layers: tuple[str, ...] = field(default=(), metadata=_in(_LAYERS, "NAME,..."))
    """Which layers of the checkpoint, by name; * and ? match any characters, as in model.layers.1?. Default: all."""
    experts: str | None = field(default=None, metadata=_in(_LAYERS, "A-B"))
    """Hold only the experts with global ids A to B, both included, of every layer. Default: all."""
    calibration: Path | None = field(default=None, metadata=_in(_LAYERS, "FILE"))
    """Input scales (.json or .safetensors) for a checkpoint that has none, or instead of its own; tokens, if it holds
    some, are what weights that are not FP8 yet are rounded for."""
    synthetic: str | None = field(default=None, metadata=_in(_LAYERS, "PRESET"))
    """Serve layers of random weights in the shape of a known model, such as qwen3-30b-a3b; for benchmarks."""
    synthetic_layers: int = field(default=1, metadata=_in(_LAYERS, "N"))
    """How many synthetic layers."""
    synthetic_seed: int = field(default=0, metadata=_in(_LAYERS, "N"))
    """Seed of the synthetic weights; servers with equal seeds hold slices of one and the same layer."""
    weights_version: int = field(default=1, metadata=_in(_LAYERS, "N"))
    """Version that the answers of these weights carry; at least 1."""
    device: str = field(default="auto", metadata=_in(_LAYERS, "DEVICE"))
    """What computes: cpu, cuda, cuda:N, or auto for a GPU where there is one."""
    memory_budget_bytes: int | None = field(default=None, metadata=_in(_LAYERS, "BYTES"))
    """Refuse to start, or to load a version, when the layers would hold more device memory than this. Default: no
    bound."""

    host: str = field(default="127.0.0.1", metadata=_in(_NETWORK, "ADDRESS"))
    """Address to listen on. Only this machine can reach the default; 0.0.0.0 opens every IPv4 interface, and then TLS
    is in order."""
    port: int = field(default=50051, metadata=_in(_NETWORK, "PORT"))
    """gRPC port; 0 picks a free one, which the ready line and the ready file tell."""
    metrics_port: int | None = field(default=None, metadata=_in(_NETWORK, "PORT"))
    """Serve Prometheus metrics over HTTP on this port of the same address; 0 picks a free one. Default: none."""
    reflection: bool = field(default=True, metadata=_in(_NETWORK))
    """Answer gRPC server reflection, so that tools such as grpcurl need no proto file."""
    max_message_bytes: int = field(default=268435456, metadata=_in(_NETWORK, "BYTES"))
    """Most bytes in one message, either way."""

    tls_cert_file: Path | None = field(default=None, metadata=_in(_TLS, "FILE"))
    """The server's certificate chain, PEM; together with --tls-key-file it turns TLS on."""
    tls_key_file: Path | None = field(default=None, metadata=_in(_TLS, "FILE"))
    """The certificate's private key, PEM."""
    tls_client_ca_file: Path | None = field(default=None, metadata=_in(_TLS, "FILE"))
    """Take only clients whose certificate one of these authorities signed, PEM (mutual TLS)."""

    max_batch_tokens: int = field(default=4096, metadata=_in(_BATCHING, "N"))
    """Most tokens in one batch, and so in one request."""
    max_queue_tokens: int = field(default=32768, metadata=_in(_BATCHING, "N"))
    """Most tokens that may wait; beyond, requests get RESOURCE_EXHAUSTED and the time to come back."""
    max_queue_requests: int = field(default=4096, metadata=_in(_BATCHING, "N"))
    """Most requests that may wait."""
    max_queue_delay_us: int = field(default=0, metadata=_in(_BATCHING, "MICROSECONDS"))
    """How long a request may wait for company while the backend is free. 0: a batch is what waits anyway."""
    max_graph_tokens: int = field(default=4096, metadata=_in(_BATCHING, "N"))
    """On a GPU: batches of up to this many tokens run as CUDA graphs, captured at start. 0: no graphs."""
    max_streams: int = field(default=64, metadata=_in(_BATCHING, "N"))
    """Most open ForwardStream calls; beyond, RESOURCE_EXHAUSTED."""
    max_stream_requests: int = field(default=32, metadata=_in(_BATCHING, "N"))
    """Most requests of one stream that are read but not answered; beyond, the stream is not read on."""
    max_stream_answer_bytes: int = field(default=67108864, metadata=_in(_BATCHING, "BYTES"))
    """While the caller of a stream has not taken so many bytes of answers, the stream is not read on. What was read
    before is still answered; with front-ends, in their own memory, not in what they share with the engine."""
    max_unary_requests: int = field(default=64, metadata=_in(_BATCHING, "N"))
    """Most Forward calls at a time; beyond, RESOURCE_EXHAUSTED."""
    request_timeout_s: float = field(default=60.0, metadata=_in(_BATCHING, "SECONDS"))
    """Give up on a request after this time where the caller sets no earlier deadline."""

    shared_memory: bool = field(default=True, metadata=_in(_SHARED_MEMORY))
    """Let callers on this machine share memory with their stream, and send where tensors lie instead of their bytes."""
    shared_memory_dir: Path | None = field(default=None, metadata=_in(_SHARED_MEMORY, "PATH"))
    """Directory for the Unix socket that they hand memory in by, the same path for them, where they run in other
    containers. Default: none, a socket that everybody in this network namespace can reach."""
    shared_memory_any_user: bool = field(default=False, metadata=_in(_SHARED_MEMORY))
    """Take memory of any user. Off: of the user that the server runs as."""
    max_region_bytes: int = field(default=1073741824, metadata=_in(_SHARED_MEMORY, "BYTES"))
    """Most bytes that one stream may share. The memory is its caller's: pages count where they are first written."""
    max_pinned_bytes: int = field(default=4294967296, metadata=_in(_SHARED_MEMORY, "BYTES"))
    """On a Hopper GPU: most bytes of shared memory, of callers and of front-ends, that are pinned, so that the GPU
    copies large tensors from there by itself, and answers to there; in pieces of 4 MiB, where requests lie. 0: the
    processor copies."""

    frontends: int = field(default=0, metadata=_in(_PROCESSES, "N"))
    """Answer gRPC in this many processes that share the port, apart from the one that computes; for throughput beyond
    what one Python process can send and receive. max_streams and max_unary_requests then count for each of them. 0: one
    process does everything."""
    frontend_arena_bytes: int = field(default=536870912, metadata=_in(_PROCESSES, "BYTES"))
    """Most memory that each front-end shares with the process that computes, for requests in flight and their answers;
    at least max_message_bytes and 64 KiB. Pages are taken when first needed, and kept; /dev/shm is not used."""
    engine_restart: bool = field(default=True, metadata=_in(_PROCESSES))
    """With front-ends: start the process that computes again when it dies. Off: the server ends then, exit code 1."""
    admin: bool = field(default=False, metadata=_in(_ADMIN))
    """Answer AdminService: load weights, swap and unload versions of a layer, drain the server."""
    admin_host: str = field(default="127.0.0.1", metadata=_in(_ADMIN, "ADDRESS"))
    """Address to answer it on, with TLS if the server has it. Whoever reaches it commands the server: beyond this
    machine it takes mutual TLS with an authority of its own (--admin-client-ca-file)."""
    admin_port: int = field(default=50052, metadata=_in(_ADMIN, "PORT"))
    """Port to answer it on; 0 picks a free one."""
    admin_client_ca_file: Path | None = field(default=None, metadata=_in(_ADMIN, "FILE"))
    """Take orders only from clients whose certificate one of these authorities signed, PEM: not the authority of the
    clients that send requests, or each of them commands the server. Default: --tls-client-ca-file, on this machine
    alone."""

    shutdown_grace_s: float = field(default=30.0, metadata=_in(_OPERATION, "SECONDS"))
    """After SIGTERM or SIGINT: how long requests in flight may take to finish before the process ends anyway."""
    engine_hang_timeout_s: float = field(default=60.0, metadata=_in(_OPERATION, "SECONDS"))
    """When a batch has not ended after this time, or requests wait and none is taken, what computes is held to hang:
    the server says NOT_SERVING, fails its requests with UNAVAILABLE and ends with exit code 1; with front-ends the
    process that computes is killed, and started again (engine_restart), also when it has said nothing for so long. Set
    it above what the longest batch takes, on a CPU minutes perhaps. 0: never."""
    ready_file: Path | None = field(default=None, metadata=_in(_OPERATION, "FILE"))
    """Write one line of JSON here when every layer answers: address, port, metrics_port, admin_port, pid,
    instance_id. With front-ends also engine_pid and frontend_pids; it is removed while the engine or a front-end does
    not answer."""
    tune_malloc: bool = field(default=True, metadata=_in(_OPERATION))
    """Start with glibc malloc settings that keep the memory of large messages mapped, unless the environment has its
    own; they save each answer of 0.5 MB about a millisecond. Freed memory then stays with the process, up to 4 GiB."""
    grpc_on_one_core: bool = field(default=False, metadata=_in(_OPERATION))
    """Keep the threads of gRPC, of each process that answers it, together on one core, another one for each process:
    a lone request takes a tenth less, and all requests of a process share the core. For machines with no other server
    on them; the cores are those that taskset or a cpuset leaves to the server, from the last one on."""
    tune_kernels: bool = field(default=False, metadata=_in(_OPERATION))
    """On a Hopper GPU: measure at start which tile shapes are fastest for each kind of layer, up to max_batch_tokens.
    Takes seconds for each kind; answers keep their bits. Off: a built-in choice, or what the tuning cache holds."""
    tuning_cache: Path | None = field(default=None, metadata=_in(_OPERATION, "FILE"))
    """JSON file that keeps what was measured, by GPU and kind of layer; read at start where it exists."""
    expert_token_metrics: bool = field(default=False, metadata=_in(_OPERATION))
    """Export tokens by layer and expert: one time series for each pair."""
    log_level: str = field(default="info", metadata=_in(_OPERATION, choices=_LOG_LEVELS))
    """Least level that is logged, to standard error."""
    log_format: str = field(default="text", metadata=_in(_OPERATION, choices=_LOG_FORMATS))
    """One line per event either way."""

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            self._check_range(name, least, most)
        # A request may be as large as a batch, and must fit in the queue.
        self._check_range("max_queue_tokens", self.max_batch_tokens, _UINT32_MAX)
        self._check_seconds()
        for option in dataclasses.fields(self):
            choices = option.metadata["choices"]
            if choices and getattr(self, option.name) not in choices:
                raise self._error(option.name, f"one of {', '.join(choices)}")
        if not _DEVICE.fullmatch(self.device):
            raise self._error("device", "cpu, cuda, cuda:N or auto")
        for name in ("host", "admin_host"):
            if not getattr(self, name):
                raise self._error(name, "an address such as 127.0.0.1")
        self._check_arena()
        self._check_tls()
        if self.checkpoint is None:
            for name in ("layers", "calibration"):
                if getattr(self, name):
                    raise self._error(name, "nothing unless checkpoint is given")
        if self.experts is not None:
            _parse_experts(self.experts)

    @property
    def max_frontend_requests(self) -> int:
        """Most requests of one front-end in flight: no more than may wait in the engine would be of use."""
        return min(self.max_queue_requests, _MAX_FRONTEND_REQUESTS)

    @property
    def expert_range(self) -> range | None:
        """`experts` as a range of global ids; None: all."""
        return None if self.experts is None else _parse_experts(self.experts)

    def _check_arena(self) -> None:
        """The largest request, or answer, must fit."""
        if self.frontends:
            self._check_range("frontend_arena_bytes", self.max_message_bytes + LARGEST_BLOCK_OVERHEAD_BYTES, _UNBOUNDED)

    def _check_seconds(self) -> None:
        for name in ("request_timeout_s", "shutdown_grace_s"):
            if not 0 < getattr(self, name) <= _MAX_SECONDS:
                raise self._error(name, f"a positive number of seconds, at most {_MAX_SECONDS}")
        if not 0 <= self.engine_hang_timeout_s <= _MAX_SECONDS:
            raise self._error("engine_hang_timeout_s", f"a number of seconds, 0 for never, at most {_MAX_SECONDS}")

    def _check_tls(self) -> None:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            missing = "tls_cert_file" if self.tls_cert_file is None else "tls_key_file"
            raise self._error(missing, "a file: tls_cert_file and tls_key_file go together")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise self._error("tls_cert_file", "a file: tls_client_ca_file needs the server's own certificate")
        if self.admin_client_ca_file is not None and self.tls_cert_file is None:
            raise self._error("tls_cert_file", "a file: admin_client_ca_file needs the server's own certificate")
        if self.admin and not _is_loopback(self.admin_host) and self.admin_client_ca_file is None:
            raise self._error("admin_host", "an address of this machine alone, or mutual TLS (admin_client_ca_file)")

    def _check_range(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if value is not None and not least <= value <= most:
            raise self._error(name, f"{least} to {most}")

    def _error(self, name: str, expected: str) -> ConfigError:
        return ConfigError(f"{name} is {getattr(self, name)!r}, expected {expected}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare every option as a flag; those that are not given leave no trace in the parsed namespace."""
    groups: dict[str, Any] = {}
    for option in dataclasses.fields(Config):
        group = option.metadata["group"]
        target = groups.setdefault(group, parser.add_argument_group(group))
        arguments: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS}
        text = f"{_docs()[option.name]} [{_env_name(option.name)}; default: {_shown(option)}]"
        arguments["help"] = text.replace("%", "%%")
        if _hints()[option.name] is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments["metavar"] = option.metadata["metavar"] or "{" + ",".join(option.metadata["choices"]) + "}"
        target.add_argument(_flag(option.name), **arguments)


def config_from(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Config:
    """The options as given: a flag wins over its environment variable, which wins over the default.

    flags: strings (booleans for switches) by field name; other keys are ignored.
    Raises ConfigError naming the flag or variable.
    """
    values: dict[str, Any] = {}
    for name in (option.name for option in dataclasses.fields(Config)):
        if name in flags:
            values[name] = _parsed(name, flags[name], _flag(name))
        elif _env_name(name) in environment:
            values[name] = _parsed(name, environment[_env_name(name)], _env_name(name))
    return Config(**values)


def command_line(config: Config) -> list[str]:
    """Flags of `serve` that stand for these options; those that have their defaults are left out."""
    flags: list[str] = []
    for option in dataclasses.fields(Config):
        value = getattr(config, option.name)
        if value == option.default:
            continue
        if isinstance(value, bool):
            flags.append(_flag(option.name if value else f"no_{option.name}"))
        else:
            flags += [_flag(option.name), ",".join(value) if isinstance(value, tuple) else str(value)]
    return flags


def markdown_table() -> str:
    """Every option as Markdown, for docs/configuration.md."""
    lines: list[str] = []
    group = None
    for option in dataclasses.fields(Config):
        if option.metadata["group"] != group:
            group = option.metadata["group"]
            lines += ["", f"## {group[0].upper()}{group[1:]}", "", "| flag | environment | default | meaning |"]
            lines += ["|---|---|---|---|"]
        cells = (f"`{_flag(option.name)}`", f"`{_env_name(option.name)}`", _shown(option), _docs()[option.name])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).strip() + "\n"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _env_name(name: str) -> str:
    return ENV_PREFIX + name.upper()


def _shown(option: dataclasses.Field[Any]) -> str:
    match option.default:
        case None | ():
            return "none"
        case bool():
            return "on" if option.default else "off"
        case default:
            return str(default)


@functools.cache
def _hints() -> dict[str, Any]:
    """The type of each option, `| None` removed."""
    hints = typing.get_type_hints(Config)
    return {
        name: next((arm for arm in typing.get_args(hint) if arm is not NoneType), hint)
        if NoneType in typing.get_args(hint)
        else hint
        for name, hint in hints.items()
    }


def _parsed(name: str, value: Any, source: str) -> Any:
    """A flag's or variable's text as the option's type. Raises ConfigError naming the source."""
    if isinstance(value, bool):
        return value
    kind = _hints()[name]
    parsers: dict[Any, tuple[Callable[[str], Any], str]] = {
        int: (int, "a whole number"),
        float: (float, "a number"),
        bool: (_parse_bool, "on or off"),
        tuple[str, ...]: (lambda text: tuple(part.strip() for part in text.split(",") if part.strip()), "names"),
    }
    parse, expected = parsers.get(kind, (kind, "text"))
    try:
        return parse(value)
    except ValueError:
        hint = ""
        if str(value).startswith("tcp://"):
            hint = "; Kubernetes sets this for a Service of that name: set enableServiceLinks: false in the pod"
        raise ConfigError(f"{source} is {value!r}, expected {expected}{hint}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parse_experts(text: str) -> range:
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise ConfigError(f"experts is {text!r}, expected two global ids, the smaller first, such as 0-63")
    return range(int(first), int(last) + 1)


def _parse_bool(text: str) -> bool:
    if text.lower() in ("on", "true", "yes", "1"):
        return True
    if text.lower() in ("off", "false", "no", "0"):
        return False
    raise ValueError(text)


@functools.cache
def _docs() -> dict[str, str]:
    """The docstring under each field; Python itself keeps none, so they are read from the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(Config))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


if __name__ == "__main__":
    print(markdown_table(), end="")
