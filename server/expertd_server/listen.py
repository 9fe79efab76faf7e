"""Ports: opened with TLS where the options say so, refused by name where they cannot be."""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
from pathlib import Path

import grpc

from expertd_server.config import Config
from expertd_server.errors import ConfigError
from expertd_server.ready import target_of

__all__ = ["bind"]


def bind(
    server: grpc.Server | grpc.aio.Server,
    config: Config,
    host: str,
    port: int,
    *,
    client_ca_option: str = "tls_client_ca_file",
    shares_port: bool = False,
) -> int:
    """Have a gRPC server listen, with the TLS options of `config`; returns the real port. Raises ConfigError.

    client_ca_option: the one that names the authorities of the clients. shares_port: others may listen there too.
    """
    address = target_of(host, port)
    if port and not shares_port:
        _check_free(host, port)
    try:
        if config.tls_cert_file is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _credentials(config, client_ca_option))
    except RuntimeError as error:
        # NOTE: a port that is taken was found before, unless others may listen there too.
        otherwise = "is it an address of this machine, and a port for this user?"
        raise ConfigError(
            f"cannot listen on {address}: {_tls_problem(config, client_ca_option) or f'{error}; {otherwise}'}"
        ) from error


def _tls_problem(config: Config, client_ca_option: str) -> str:
    """What is wrong with the files, if anything; gRPC says that to its own log alone."""
    if config.tls_cert_file is None:
        return ""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.tls_cert_file, config.tls_key_file, password=lambda: "")
    except (OSError, ValueError) as error:
        what = "are no certificate in PEM and its private key without a password"
        return f"tls_cert_file {config.tls_cert_file} and tls_key_file {config.tls_key_file} {what}: {error}"
    authorities: Path | None = getattr(config, client_ca_option)
    try:
        if authorities is not None:
            context.load_verify_locations(authorities)
    except (OSError, ValueError) as error:
        return f"{client_ca_option} {authorities} holds no certificate in PEM: {error}"
    return ""


def _check_free(host: str, port: int) -> None:
    """Raise ConfigError where somebody has the port at one of the host's addresses.

    gRPC is content with the free ones of them: "localhost" is two, and calls to the other would reach somebody else.
    """
    with contextlib.suppress(socket.gaierror):  # gRPC has words for that
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                with socket.socket(family, kind, protocol) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:  # of an address that is not here gRPC does without, too
                    where = f"{host}:{port}" if address[0] == host else f"{host}:{port} ({address[0]})"
                    raise ConfigError(f"cannot listen on {where}: {error.strerror}; is the port in use?") from error


def _credentials(config: Config, client_ca_option: str) -> grpc.ServerCredentials:
    assert config.tls_cert_file is not None
    assert config.tls_key_file is not None
    pair = (_read("tls_key_file", config.tls_key_file), _read("tls_cert_file", config.tls_cert_file))
    authorities: Path | None = getattr(config, client_ca_option)
    if authorities is None:
        return grpc.ssl_server_credentials([pair])
    return grpc.ssl_server_credentials([pair], _read(client_ca_option, authorities), require_client_auth=True)


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option} is {path}, expected a readable PEM file: {error.strerror}") from error
