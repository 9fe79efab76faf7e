"""The command line: serve, inspect, health, admin, plan, cluster, demo. Exit codes: see `exits`."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from expertd_server import __version__
from expertd_server.admin_cli import add_admin_parser
from expertd_server.cluster_cli import add_cluster_command
from expertd_server.config import Config, add_flags, config_from
from expertd_server.errors import ConfigError
from expertd_server.exits import EXIT_CUT_OFF, EXIT_FAILED, end_hung, end_with, exit_code_of
from expertd_server.garbage import look_rarely
from expertd_server.grpc_polling import read_where_messages_are_awaited
from expertd_server.logs import configure_logging
from expertd_server.malloc import reexec_with_settings
from expertd_server.plan_cli import add_plan_command
from expertd_server.ready import target_of

__all__ = ["main"]

log = logging.getLogger(__name__)

_MAX_HEALTH_TIMEOUT_S = 86400

_SERVE_EXAMPLES = """\
examples:
  Try it without a checkpoint, on the CPU:
    expertd-server serve --synthetic tiny --device cpu
  Every MoE layer of a Hugging Face checkpoint, on the GPU where there is one, with metrics:
    expertd-server serve --checkpoint ./Qwen3-30B-A3B-FP8 --metrics-port 9090
  The first half of the experts of layers 10 to 19:
    expertd-server serve --checkpoint ./Qwen3-30B-A3B-FP8 --layers 'model.layers.1?' --experts 0-63
  On the network, with mutual TLS:
    expertd-server serve --checkpoint ./ckpt --host 0.0.0.0 \\
      --tls-cert-file server.pem --tls-key-file server.key --tls-client-ca-file clients.pem
  With an admin port for this machine, to replace weights while it runs (expertd-server admin --help):
    expertd-server serve --checkpoint ./ckpt --admin
  More requests than one Python process can send and receive: four processes speak gRPC, a fifth computes
    expertd-server serve --checkpoint ./Qwen3-30B-A3B-FP8 --frontends 4
  For a launcher: any free port, told in a file, and in a line of JSON on standard output, once every layer answers:
    expertd-server serve --synthetic tiny --port 0 --ready-file ready.json

Every option is also an environment variable, in brackets below the flag; flags win.
"""

_INSPECT_EXAMPLES = """\
examples:
  Before a server is started with it:
    expertd-server inspect ./ckpt
  One file, with config.json beside it, in a script that goes on only with what can be served:
    expertd-server inspect ./ckpt/model.safetensors && expertd-server serve --checkpoint ./ckpt/model.safetensors
"""

_DEMO_EXAMPLES = """\
examples:
  See what is built and asked, how soon it is answered, and whether every answer is right:
    expertd-server demo
  In a script: exit code 0 when every answer was right, and something to read when one was not:
    expertd-server demo > demo.txt || cat demo.txt
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the process' exit code."""
    options = _parser().parse_args(arguments)
    return exit_code_of(lambda: options.run(options))


def _serve(options: argparse.Namespace) -> int:
    config = config_from(vars(options))
    if config.tune_malloc:
        reexec_with_settings()
    read_where_messages_are_awaited()
    if config.frontends:
        configure_logging(config.log_level, config.log_format, "supervisor")
        from expertd_server.supervisor import Supervisor  # noqa: PLC0415

        return Supervisor(config).run()
    return _serve_in_this_process(config)


def _serve_in_this_process(config: Config) -> NoReturn:
    configure_logging(config.log_level, config.log_format)
    from expertd_server.server import Server, stop_on_signals  # noqa: PLC0415 (torch: --help should not wait for it)

    look_rarely()
    server = Server(config, is_alone=True)
    stop_on_signals(server)

    def run() -> int:
        try:
            if server.startup():
                print(json.dumps(server.ready_facts()), flush=True)
                server.serve()
        except BaseException:
            server.shutdown()
            raise
        if server.has_hung:
            end_hung(server.shutdown)
        is_drained = server.shutdown()
        if server.has_hung:  # found out meanwhile
            end_hung(lambda: None)
        return 0 if is_drained else EXIT_CUT_OFF

    end_with(run)  # a batch that was cut off, or an order to load a layer, may still have hours to go


def _inspect(options: argparse.Namespace) -> int:
    from expertd_server.audit import print_audit  # noqa: PLC0415

    return 0 if print_audit(options.checkpoint) else EXIT_FAILED


def _demo(_options: argparse.Namespace) -> int:
    from expertd_server.demo import run_demo  # noqa: PLC0415

    return run_demo()


def _health(options: argparse.Namespace) -> int:
    import grpc  # noqa: PLC0415 (the other commands do not need it so early)

    from expertd_server.health import check_health  # noqa: PLC0415

    if not 0 < options.timeout_s <= _MAX_HEALTH_TIMEOUT_S:
        raise ConfigError(
            f"--timeout-s is {options.timeout_s:g}, expected a positive number of seconds, at most "
            f"{_MAX_HEALTH_TIMEOUT_S}"
        )
    pair = (options.key_file, options.cert_file)
    if pair != (None, None) and None in (options.ca_file, *pair):
        raise ConfigError("--cert-file and --key-file go together, and with --ca-file; give all three or none of them")
    if options.target is None and options.ca_file is None and config_from({}).tls_cert_file is not None:
        raise ConfigError(
            "the server of this environment speaks TLS (EXPERTD_TLS_CERT_FILE), expected --ca-file, and where its "
            "certificate holds another name --target"
        )
    credentials = None
    if options.ca_file is not None:
        key, certificate = (None if path is None else _read(path) for path in pair)
        credentials = grpc.ssl_channel_credentials(_read(options.ca_file), key, certificate)
    return check_health(options.target or _default_target(), options.service, options.timeout_s, credentials)


def _default_target() -> str:
    """The server that the same environment would start, as seen from its own machine."""
    config = config_from({})
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return target_of(host, config.port)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}, expected a readable PEM file") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expertd-server", description="A mixture-of-experts layer with FP8 per-tensor scales, served over gRPC."
    )
    parser.add_argument("--version", action="version", version=f"expertd-server {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="answer requests over gRPC",
        description="Load MoE layers and answer requests over gRPC until SIGTERM or SIGINT.",
        epilog=_SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(serve)
    serve.set_defaults(run=_serve)
    inspect = commands.add_parser(
        "inspect",
        help="say what a checkpoint holds and what a server would make of it",
        description="Read the headers and scales of a checkpoint, and say which of its layers can be served.\n"
        "Exit code 0: every layer, given a calibration file where it says that input scales are missing;\n"
        "1: one or more cannot be loaded; 2: the checkpoint as a whole cannot be read.",
        epilog=_INSPECT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("checkpoint", type=Path, metavar="PATH", help="a directory or one .safetensors file")
    inspect.set_defaults(run=_inspect)
    health = commands.add_parser(
        "health",
        help="ask a server whether it answers: exit code 0 or 1",
        description="Ask grpc.health.v1 of a running server once.\n"
        "Exit code 0: SERVING; 1: anything else; 2: options that cannot be used.",
    )
    health.add_argument("--target", metavar="HOST:PORT", help="default: this machine, with EXPERTD_HOST, EXPERTD_PORT")
    health.add_argument(
        "--service",
        default="",
        metavar="NAME",
        help="a layer's name, or live: whether it answers at all; default: the whole server",
    )
    health.add_argument("--timeout-s", type=float, default=2.0, metavar="SECONDS", help="default: 2")
    health.add_argument("--ca-file", type=Path, metavar="FILE", help="ask over TLS, trusting this authority, PEM")
    health.add_argument("--cert-file", type=Path, metavar="FILE", help="the client's certificate, PEM, for mutual TLS")
    health.add_argument("--key-file", type=Path, metavar="FILE", help="the certificate's private key, PEM")
    health.set_defaults(run=_health)
    add_admin_parser(commands)
    add_plan_command(commands)
    add_cluster_command(commands)
    demo = commands.add_parser(
        "demo",
        help="build a small model, serve it, talk to it, check the answers",
        description="Build a small MoE checkpoint, serve it in a process of its own, send it hidden states of real\n"
        "text from several clients, and check every answer. Takes less than two minutes, needs no network.",
        epilog=_DEMO_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.set_defaults(run=_demo)
    return parser
