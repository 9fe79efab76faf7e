"""Who may give orders, and where: a port of its own, off by default, mutual TLS beyond the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from admin_cases import ADMIN
from serving import LAYER, OTHER_LAYER, running

import expertd
from expertd_server.backend import Backend
from expertd_server.backend_cpu import TorchBackend
from expertd_server.config import Config
from expertd_server.errors import ConfigError
from expertd_server.server import Server

CERTS = Path(__file__).parent / "certs"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, r"start the server with --admin \(EXPERTD_ADMIN=on\)"),
        (ADMIN, r"answered on 127\.0\.0\.1:\d+ \(admin_host"),
    ],
    ids=["off", "elsewhere"],
)
def test_the_data_port_takes_no_orders(options: dict[str, Any], says: str) -> None:
    with running(**options) as live, expertd.AdminClient(f"127.0.0.1:{live.server.port}") as admin:
        orders: list[Callable[[], object]] = [
            lambda: admin.load_layer(LAYER, 2, synthetic="tiny"),
            lambda: admin.swap_weights(LAYER, 1),
            lambda: admin.unload_layer(LAYER),
            admin.drain,
        ]
        for order in orders:
            with pytest.raises(expertd.AccessDeniedError, match=says) as caught:
                order()
            assert caught.value.reason == "ADMIN_NOT_HERE"
        count = live.server.metrics.registry.get_sample_value
        for method in ("LoadLayer", "SwapWeights", "UnloadLayer", "Drain"):
            assert count("expertd_requests_total", {"method": method, "code": "PERMISSION_DENIED"}) == 1
        assert live.server.admin_port is None if not options else live.server.admin_port != live.server.port


def test_beyond_this_machine_orders_take_mutual_tls() -> None:
    tls = {"tls_cert_file": CERTS / "server.pem", "tls_key_file": CERTS / "server.key"}
    clients = {"tls_client_ca_file": CERTS / "authority.pem"}
    for options in ({}, tls, {**tls, **clients}):
        with pytest.raises(ConfigError, match=r"admin_host is '0\.0\.0\.0', expected .*mutual TLS"):
            Config(admin=True, admin_host="0.0.0.0", **options)
    Config(admin_host="0.0.0.0")  # off, so nobody listens
    # "intruder" is signed by the other authority, here that of the administrators.
    administrators = {"admin_client_ca_file": CERTS / "stranger.pem", "admin_host": "0.0.0.0"}
    with running(**tls, **clients, **administrators, **ADMIN) as live:
        target = f"127.0.0.1:{live.server.admin_port}"
        known = {"ca_file": CERTS / "authority.pem", "server_name": "localhost"}
        pair = {"cert_file": CERTS / "intruder.pem", "key_file": CERTS / "intruder.key"}
        with expertd.AdminClient(expertd.ClientConfig(target, **known, **pair)) as admin:
            assert admin.swap_weights(LAYER, 1).previous_weights_version == 1
        client = {"cert_file": CERTS / "client.pem", "key_file": CERTS / "client.key"}
        for others in ({}, client):
            other = expertd.AdminClient(expertd.ClientConfig(target, **known, **others))
            with other, pytest.raises(expertd.UnavailableError):
                other.swap_weights(LAYER, 1)
        data = expertd.ClientConfig(f"127.0.0.1:{live.server.port}", **known, **client)
        with expertd.Client(data) as sender:
            assert [layer.name for layer in sender.layers()] == [LAYER, OTHER_LAYER]


def test_an_admin_port_in_use_is_said_by_name() -> None:
    with running(**ADMIN) as live:
        backend: Backend = TorchBackend("cpu")
        config = Config(port=0, admin=True, admin_port=live.server.admin_port or 0)
        server = Server(config, backend=backend, layers=[])
        with pytest.raises(ConfigError, match=f"127.0.0.1:{live.server.admin_port}.*in use"):
            server.startup()
        server.shutdown()
