"""The SDK and mutual TLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fake_service import FakeServer
from sdk_cases import Driver, expected_output, tokens

import expertd

CERTIFICATES = Path(__file__).parent / "certs"


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_mutual_tls_from_files_and_from_bytes(flavour: str) -> None:
    def pem(name: str) -> bytes:
        return (CERTIFICATES / name).read_bytes()

    credentials = grpc.ssl_server_credentials(
        [(pem("server.key"), pem("server.pem"))], root_certificates=pem("authority.pem"), require_client_auth=True
    )
    server = FakeServer(credentials=credentials)
    hidden, logits = tokens(3)
    files: dict[str, Any] = {
        "ca_file": CERTIFICATES / "authority.pem",
        "cert_file": str(CERTIFICATES / "client.pem"),
        "key_file": CERTIFICATES / "client.key",
    }
    in_memory = {"ca_pem": pem("authority.pem"), "cert_pem": pem("client.pem"), "key_pem": pem("client.key")}
    once = expertd.RetryPolicy(max_attempts=1)

    def forward(**options: Any) -> Any:
        driver = Driver(flavour, expertd.ClientConfig(server.target, retry=once, **options))
        try:
            return driver.forward("a", hidden, routing_logits=logits, output_dtype="float32", timeout_s=10)
        finally:
            driver.shut()

    try:
        for options in (files, in_memory):
            result = forward(**options)
            assert np.array_equal(result.output, expected_output(hidden, logits))
        for options in (
            {**files, "server_name": "expertd.test"},  # the certificate is for localhost
            {**files, "ca_file": CERTIFICATES / "stranger.pem"},  # another authority
            {"ca_pem": pem("authority.pem")},  # no client certificate
            {"tls": True},  # the system does not know the authority
            {},  # no TLS at all
        ):
            with pytest.raises(expertd.UnavailableError):
                forward(**options)
        assert len(server.service.parts) == 2
    finally:
        server.stop()
