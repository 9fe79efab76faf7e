"""Whether this kernel lets a program choose among the sockets that share a port."""

from __future__ import annotations

import socket

import pytest

from expertd_server.port_sharing import _attach, lots

__all__ = ["skip_without_programs"]


def skip_without_programs() -> None:
    """Skip a test that needs one, with the reason."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind(("127.0.0.1", 0))
        try:
            _attach(one.fileno(), lots([1]))
        except OSError as error:
            pytest.skip(f"this kernel takes no program for a port that is shared: {error}")
