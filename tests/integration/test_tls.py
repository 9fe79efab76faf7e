"""TLS and mutual TLS, with the certificates under certs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from serving import PATIENCE_S, insecure_channel, running

from expertd.v1 import expertd_pb2 as pb
from expertd.v1 import expertd_pb2_grpc
from expertd_server.config import Config
from expertd_server.errors import ConfigError
from expertd_server.server import Server

CERTS = Path(__file__).parent / "certs"

TLS = {"tls_cert_file": CERTS / "server.pem", "tls_key_file": CERTS / "server.key"}
MUTUAL_TLS = {**TLS, "tls_client_ca_file": CERTS / "authority.pem"}


def ask(port: int, *, authority: str = "authority", client: str | None = None) -> pb.GetServerInfoResponse:
    """One call over TLS. authority: whom the client trusts; client: whose certificate it shows."""
    credentials = grpc.ssl_channel_credentials(
        (CERTS / f"{authority}.pem").read_bytes(),
        None if client is None else (CERTS / f"{client}.key").read_bytes(),
        None if client is None else (CERTS / f"{client}.pem").read_bytes(),
    )
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        stub = expertd_pb2_grpc.ExpertServiceStub(channel)
        answer: pb.GetServerInfoResponse = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=PATIENCE_S)
        return answer


def test_a_client_that_trusts_the_authority_gets_in() -> None:
    with running(host="localhost", **TLS) as live:
        assert ask(live.server.port).backend == "cpu"


def test_a_client_that_trusts_another_does_not() -> None:
    with running(host="localhost", **TLS) as live, pytest.raises(grpc.RpcError) as caught:
        ask(live.server.port, authority="stranger")
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_plain_text_is_not_answered() -> None:
    with running(host="localhost", **TLS) as live, insecure_channel(live.server.port) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            expertd_pb2_grpc.ExpertServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=PATIENCE_S)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_mutual_tls_takes_only_clients_of_the_authority() -> None:
    with running(host="localhost", **MUTUAL_TLS) as live:
        assert ask(live.server.port, client="client").backend == "cpu"
        for client in (None, "intruder"):
            with pytest.raises(grpc.RpcError) as caught:
                ask(live.server.port, client=client)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE, client


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tls_cert_file": CERTS / "nowhere.pem"}, "tls_cert_file is .*nowhere.pem, expected a readable PEM file"),
        ({"tls_key_file": CERTS / "client.key"}, "cannot listen"),
        ({"tls_key_file": CERTS / "make.sh"}, "cannot listen"),
    ],
)
def test_certificates_that_cannot_be_used_are_said_at_startup(options: dict[str, Any], says: str) -> None:
    server = Server(Config(port=0, device="cpu", **{**TLS, **options}), layers=[])
    try:
        with pytest.raises(ConfigError, match=says):
            server.startup()
    finally:
        server.shutdown()
