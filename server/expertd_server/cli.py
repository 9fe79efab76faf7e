"""The command line: serve, inspect, demo.

Exit codes: 0 done; 1 it failed on the way, the last line of standard error says why; 2 the command line, an option or
the checkpoint cannot be used; 3 stopped with requests still in flight after shutdown_grace_s.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from expertd_server import __version__
from expertd_server.config import add_flags, config_from
from expertd_server.errors import CheckpointError, ConfigError, ExpertdServerError
from expertd_server.logs import configure_logging

__all__ = ["main"]

log = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_UNUSABLE = 2
EXIT_CUT_OFF = 3

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
  For a launcher: any free port, told in a file, and in a line of JSON on standard output, once every layer answers:
    expertd-server serve --synthetic tiny --port 0 --ready-file ready.json

Every option is also an environment variable, in brackets below the flag; flags win.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the process' exit code."""
    options = _parser().parse_args(arguments)
    try:
        match options.command:
            case "serve":
                return _serve(options)
            case "inspect":
                return _inspect(options.checkpoint)
            case _:
                return _demo()
    except (ConfigError, CheckpointError) as error:
        return _complain(error, EXIT_UNUSABLE)
    except ExpertdServerError as error:
        return _complain(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return 130


def _serve(options: argparse.Namespace) -> int:
    config = config_from(vars(options))
    configure_logging(config.log_level, config.log_format)
    from expertd_server.server import Server, stop_on_signals  # noqa: PLC0415 (torch: --help should not wait for it)

    server = Server(config)
    stop_on_signals(server)
    try:
        if server.startup():
            print(json.dumps(server.ready_facts()), flush=True)
            server.serve()
    except BaseException:
        server.shutdown()
        raise
    return 0 if server.shutdown() else EXIT_CUT_OFF


def _inspect(checkpoint: Path) -> int:
    from expertd_server.audit import print_audit  # noqa: PLC0415

    print_audit(checkpoint)
    return 0


def _demo() -> int:
    from expertd_server.demo import run_demo  # noqa: PLC0415

    return run_demo()


def _complain(error: Exception, code: int) -> int:
    print(f"expertd-server: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expertd-server", description="A mixture-of-experts layer with FP8 per-tensor scales, served over gRPC."
    )
    parser.add_argument("--version", action="version", version=f"expertd-server {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="answer requests over gRPC",
        description="Load MoE layers and answer requests over gRPC until SIGTERM or SIGINT.",
        epilog=_SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(serve)
    inspect = commands.add_parser(
        "inspect",
        help="say what a checkpoint holds and what a server would make of it",
        description="Read the headers and scales of a checkpoint, and say which of its layers can be served.",
    )
    inspect.add_argument("checkpoint", type=Path, metavar="PATH", help="a directory or one .safetensors file")
    commands.add_parser(
        "demo",
        help="build a small model, serve it, talk to it, check the answers",
        description="Build a small MoE checkpoint, serve it in a process of its own, send it hidden states of real "
        "text from several clients, and check every answer. Takes less than two minutes, needs no network.",
    )
    return parser
