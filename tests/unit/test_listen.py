"""Opening ports, as far as it is not seen through a whole server."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from expertd_server.config import Config
from expertd_server.errors import ConfigError
from expertd_server.listen import bind

CERTS = Path(__file__).parents[1] / "integration/certs"


class Deaf:
    """Stands for a gRPC server that is content with any address."""

    def add_insecure_port(self, address: str) -> int:
        return int(address.rpartition(":")[2])


def listening(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> grpc.Server:
    """What `bind` takes as a server, on a machine where "two.test" has these addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0)) for address in addresses]

    def look_up(host: str, port: int, **_: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        assert host == "two.test"
        return [(*rest, (address, port)) for *rest, (address, _) in found]  # type: ignore[misc]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return Deaf()  # type: ignore[return-value]


def test_a_port_that_is_taken_on_one_address_of_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    server = listening(monkeypatch, "127.0.0.1", "127.0.0.2")
    with socket.create_server(("127.0.0.2", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on two.test:{port} \(127.0.0.2\): .*is the port in use"):
            bind(server, Config(), "two.test", port)
        assert bind(server, Config(), "two.test", port, shares_port=True) == port
    assert bind(server, Config(), "two.test", port) == port


def test_an_address_that_is_not_of_this_machine_is_left_to_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    server = listening(monkeypatch, "127.0.0.1", "192.0.2.1")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    assert bind(server, Config(), "two.test", port) == port


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (("server.pem", "client.key", None), "tls_cert_file .*server.pem and tls_key_file .*client.key are no certif"),
        (("make.sh", "server.key", None), "tls_cert_file .*make.sh and tls_key_file .*server.key are no certificate"),
        (("server.pem", "server.key", "make.sh"), "tls_client_ca_file .*make.sh holds no certificate in PEM"),
    ],
)
def test_files_that_tls_cannot_use_are_named(files: tuple[str, str, str | None], named: str) -> None:
    certificate, key, authority = (None if name is None else CERTS / name for name in files)
    config = Config(tls_cert_file=certificate, tls_key_file=key, tls_client_ca_file=authority)
    server = grpc.server(ThreadPoolExecutor(1))
    with pytest.raises(ConfigError, match=named):
        bind(server, config, "127.0.0.1", 0)
    server.stop(None)


def test_a_host_that_nobody_has_is_not_said_to_be_taken() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0: .*; is it an address of this machine"):
        bind(server, Config(), "192.0.2.1", 0)
    server.stop(None)
