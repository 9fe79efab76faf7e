"""ClientConfig and RetryPolicy refuse what cannot work, naming the option."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from expertd import Client, ClientConfig, ConfigError, RetryPolicy
from expertd._base import channel_options

CERTS = Path(__file__).parents[2] / "integration/certs"
PAIR = {"cert_file": CERTS / "client.pem", "key_file": CERTS / "client.key"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target": ""}, "target"),
        ({"ca_file": "a", "ca_pem": b"b"}, "ca_pem"),
        ({"cert_pem": b"c"}, "key_pem"),
        ({"key_file": "k"}, "cert_file"),
        ({"server_name": "x"}, "server_name"),
        ({"metadata": (("Upper", "x"),)}, "Upper"),
        ({"metadata": (("grpc-timeout", "1S"),)}, "grpc-timeout"),
        ({"metadata": (("x y", "x"),)}, "x y"),
        ({"metadata": (("authorization", "Bearer SECRET\n"),)}, "authorization"),
        ({"metadata": (("name", "é"),)}, "name"),
        ({"metadata": (("name", b"\xff"),)}, "name"),
        ({"metadata": (("name-bin", "text"),)}, "name-bin"),
        ({"transport": "carrier pigeon"}, "transport"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"timeout_s": 1e300}, "timeout_s"),
        ({"keepalive_time_s": -1.0}, "keepalive_time_s"),
        ({"keepalive_time_s": 1e7}, "keepalive_time_s"),
        ({"keepalive_timeout_s": 1e7}, "keepalive_timeout_s"),
        ({"num_channels": 0}, "num_channels"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"max_message_bytes": 10}, "max_message_bytes"),
        ({"max_message_bytes": 2**31}, "max_message_bytes"),
    ],
)
def test_bad_option_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as raised:
        ClientConfig(**{"target": "localhost:1", **options})
    assert "SECRET" not in str(raised.value)


def test_greatest_options_are_taken_by_grpc() -> None:
    config = ClientConfig(
        "localhost:1",
        timeout_s=1e9,
        keepalive_time_s=(2**31 - 1) // 1000,
        keepalive_timeout_s=(2**31 - 1) // 1000,
        max_message_bytes=2**31 - 1,
        metadata=(("x-key_1.a", "any ~ text"), ("name", b"text"), ("name-bin", b"\xff\n")),
    )
    Client(config).close()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_attempts": 0}, "max_attempts"),
        ({"initial_backoff_s": 0.0}, "initial_backoff_s"),
        ({"max_backoff_s": float("nan")}, "max_backoff_s"),
        ({"initial_backoff_s": 3.0, "max_backoff_s": 2.0}, "max_backoff_s"),
        ({"multiplier": 0.5}, "multiplier"),
    ],
)
def test_bad_retry_option_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        RetryPolicy(**options)


def test_certificates_imply_tls_and_come_from_file_or_bytes(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(b"authority")
    config = ClientConfig("h:1", ca_file=tmp_path / "ca.pem", cert_pem=b"chain", key_pem=b"key", server_name="h")
    assert config.uses_tls
    assert (config.pem("ca"), config.pem("cert"), config.pem("key")) == (b"authority", b"chain", b"key")
    assert not ClientConfig("h:1").uses_tls
    with pytest.raises(ConfigError, match=r"ca_file .*absent\.pem"):
        ClientConfig("h:1", ca_file=tmp_path / "absent.pem").pem("ca")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ca_pem": b""}, "ca_pem holds no .*CERTIFICATE"),
        ({"ca_file": "server.key"}, "ca_file holds no .*CERTIFICATE"),
        ({"cert_file": "client.key", "key_file": "client.key"}, "cert_file holds no .*CERTIFICATE"),
        ({"cert_file": "client.pem", "key_file": "client.pem"}, "key_file holds no .*PRIVATE KEY"),
    ],
)
def test_files_that_are_no_certificate_or_no_key_are_named(options: dict[str, Any], named: str) -> None:
    files = {name: CERTS / value if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(ConfigError, match=named):
        Client(ClientConfig("localhost:1", **files))
    Client(ClientConfig("localhost:1", ca_file=CERTS / "authority.pem", **PAIR)).close()


def test_secrets_do_not_show_in_the_repr() -> None:
    config = ClientConfig("h:1", cert_pem=b"chain", key_pem=b"SECRET", metadata=(("authorization", "SECRET"),))
    assert "SECRET" not in repr(config)


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ClientConfig("h:1").target = "other"  # type: ignore[misc]


def test_channels_raise_the_message_limits_and_do_not_share_a_connection() -> None:
    first, second = (dict(channel_options(ClientConfig("h:1", max_message_bytes=10**6), index)) for index in (0, 1))
    assert first["grpc.max_receive_message_length"] == first["grpc.max_send_message_length"] == 10**6
    assert first != second
