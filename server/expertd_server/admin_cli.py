"""The `admin` command: replaces the weights of running servers, from the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertd_server.config import config_from
from expertd_server.ready import target_of

if TYPE_CHECKING:
    from expertd import AdminClient

__all__ = ["add_admin_parser"]

_EXAMPLES = """\
New weights for a layer, without a failed request: one command after the other, each for every server of the tier.
  expertd-server admin load model.layers.0 --version 2 --checkpoint /models/step-2000 \\
    --target experts-0:50052 --target experts-1:50052
  expertd-server admin swap model.layers.0 --version 2 --target experts-0:50052 --target experts-1:50052
  expertd-server admin unload model.layers.0 --version 1 --target experts-0:50052 --target experts-1:50052
Back to the version before, until it is unloaded:
  expertd-server admin swap model.layers.0 --version 1
Take a server out of service before it is stopped:
  expertd-server admin drain --target experts-0:50052

The server has to be started with --admin. Exit code 0: every server did it; 1: one did not, the last line says why, and
the servers and layers after it were not asked.
"""


def add_admin_parser(commands: Any) -> None:
    """Declare the command. commands: what `ArgumentParser.add_subparsers` returned."""
    admin = commands.add_parser(
        "admin",
        help="replace the weights of running servers, drain them",
        description="Give orders to running servers: load, swap and unload versions of a layer's weights; drain.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    orders = admin.add_subparsers(required=True, metavar="ORDER")
    load = _order(orders, "load", _load, "read a version and hold it beside the current one", default_timeout_s=3600.0)
    load.add_argument("layers", nargs="+", metavar="LAYER", help="name of a layer")
    load.add_argument("--version", type=int, required=True, metavar="N", help="version that its answers will carry")
    source = load.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="PATH", help="absolute path on the server's disk")
    source.add_argument("--synthetic", metavar="PRESET", help="random weights, as serve --synthetic; for tests")
    load.add_argument("--calibration", metavar="FILE", help="input scales; absolute path on the server's disk")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of --synthetic; default: 0")
    load.add_argument("--layer-index", type=int, default=0, metavar="N", help="of --synthetic; default: 0")
    swap = _order(orders, "swap", _swap, "make a version that is held the current one")
    swap.add_argument("layers", nargs="+", metavar="LAYER", help="name of a layer")
    swap.add_argument("--version", type=int, required=True, metavar="N", help="a version that is held")
    unload = _order(orders, "unload", _unload, "give up a version, or a layer, and free its memory")
    unload.add_argument("layers", nargs="+", metavar="LAYER", help="name of a layer")
    which = unload.add_mutually_exclusive_group(required=True)
    which.add_argument("--version", type=int, metavar="N", help="a version that is not current")
    which.add_argument("--all-versions", action="store_true", help="the layer itself; requests for it then fail")
    _order(orders, "drain", _drain, "take no new requests, answer those admitted, stay up; only a restart ends it")


def _order(
    orders: Any, name: str, run: Any, help_text: str, default_timeout_s: float = 30.0
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = orders.add_parser(name, help=help_text, description=help_text.capitalize() + ".")
    parser.add_argument(
        "--target",
        action="append",
        metavar="HOST:PORT",
        help="admin port of a server; may be given again, for several in turn. Default: this machine, with "
        "EXPERTD_ADMIN_HOST, EXPERTD_ADMIN_PORT",
    )
    parser.add_argument(
        "--timeout-s", type=float, default=default_timeout_s, metavar="SECONDS", help=f"default: {default_timeout_s:g}"
    )
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="ask over TLS, trusting this authority, PEM")
    parser.add_argument("--cert-file", type=Path, metavar="FILE", help="the client's certificate, PEM, for mutual TLS")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="the certificate's private key, PEM")
    parser.add_argument("--server-name", metavar="NAME", help="name in the server's certificate, where it is another")
    parser.set_defaults(run=_run, order=run)
    return parser


def _run(options: argparse.Namespace) -> int:
    import expertd  # noqa: PLC0415 (--help should not wait for it)

    for target in options.target or [_default_target()]:
        try:
            config = expertd.ClientConfig(
                target,
                ca_file=options.ca_file,
                cert_file=options.cert_file,
                key_file=options.key_file,
                server_name=options.server_name,
            )
            with expertd.AdminClient(config) as client:
                for layer in getattr(options, "layers", [""]):
                    print(f"{target}: {options.order(client, layer, options)}", flush=True)
        except expertd.ExpertdError as error:
            print(f"{target}: {error.reason}: {error}", file=sys.stderr)
            return 1
    return 0


def _load(client: AdminClient, layer: str, options: argparse.Namespace) -> str:
    done = client.load_layer(
        layer,
        options.version,
        checkpoint=options.checkpoint,
        calibration=options.calibration,
        synthetic=options.synthetic,
        synthetic_seed=options.seed,
        synthetic_layer_index=options.layer_index,
        timeout_s=options.timeout_s,
    )
    held = ", ".join(map(str, done.layer.weights_versions))
    return (
        f"{layer} version {options.version} loaded, {done.weights_bytes / 1e6:.1f} MB in {done.load_time_s:.1f} s; "
        f"held: {held}; current: {done.layer.weights_version}"
    )


def _swap(client: AdminClient, layer: str, options: argparse.Namespace) -> str:
    done = client.swap_weights(layer, options.version, timeout_s=options.timeout_s)
    return f"{layer} version {done.layer.weights_version} is current, before {done.previous_weights_version}"


def _unload(client: AdminClient, layer: str, options: argparse.Namespace) -> str:
    done = client.unload_layer(layer, options.version, timeout_s=options.timeout_s)
    what = "all versions" if options.version is None else f"version {options.version}"
    state = "freed" if done.freed else "still in use by requests in flight, freed with the last of them"
    return f"{layer} {what} unloaded, {done.weights_bytes / 1e6:.1f} MB {state}"


def _drain(client: AdminClient, _layer: str, options: argparse.Namespace) -> str:
    idle = client.drain(timeout_s=options.timeout_s)
    return "drained" if idle else "draining, with requests still in flight"


def _default_target() -> str:
    config = config_from({})
    return target_of(config.admin_host, config.admin_port)
