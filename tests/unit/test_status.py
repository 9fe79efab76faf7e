"""Statuses fit into what gRPC lets through as metadata, whatever an error says."""

from __future__ import annotations

import base64
import urllib.parse

import pytest

from expertd_server.errors import InvalidArgumentError, LayerNotFoundError
from expertd_server.status import status_of

MOST_BYTES = 8192 - 512  # but for the other headers


@pytest.mark.parametrize("character", ["x", "é", "模", "😀", "\0", "%"])
@pytest.mark.parametrize("length", [300, 1024, 5000])
def test_every_status_fits_into_its_metadata(character: str, length: int) -> None:
    text = character * length
    for error in (InvalidArgumentError.of("checkpoint.path", text), LayerNotFoundError(text)):
        status = status_of(error)
        encoded = urllib.parse.quote(status.message, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")
        assert len(encoded) + len(base64.b64encode(status.SerializeToString())) <= MOST_BYTES
        assert status.message.endswith("…" if len(str(error).encode()) > 1024 else character)
        assert character in status.message
