"""A group and TLS: addresses that a name stands for are verified by that name."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import make_case, make_spec
from tier import bits, inputs, stand_for, start, stopping

from expertd import AsyncExpertGroup, ClientConfig, ExpertGroup, GroupConfig
from expertd.errors import UnavailableError

CERTS = Path(__file__).parent / "certs"
CASE = make_case(make_spec(), 5, seed=3)
HOST = "127.0.0.2"  # the certificate is for "localhost" and for 127.0.0.1 alone


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a server with a certificate."""
    server = start({"layer": CASE}, host=HOST, tls_cert_file=CERTS / "server.pem", tls_key_file=CERTS / "server.key")
    with stopping(server):
        yield server.port


def config(**options: Any) -> GroupConfig:
    client = functools.partial(ClientConfig, ca_file=CERTS / "authority.pem", **options)
    return GroupConfig(client=client, timeout_s=20.0)


def forward(flavour: str, target: Any, **options: Any) -> np.ndarray[Any, Any]:
    hidden, logits = inputs(CASE)
    if flavour == "sync":
        with ExpertGroup(target, config(**options)) as group:
            output = group.forward("layer", hidden, routing_logits=logits).output
    else:

        async def run() -> Any:
            async with AsyncExpertGroup(target, config(**options)) as group:
                return (await group.forward("layer", hidden, routing_logits=logits)).output

        output = asyncio.run(run())
    assert output is not None
    return output


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_the_name_of_the_target_is_the_name_to_expect(
    flavour: str, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_for(monkeypatch, "localhost", [HOST])
    stand_for(monkeypatch, "experts.test", [HOST])
    topology = tmp_path / "tier.json"
    topology.write_text(f'{{"expertd_topology": 1, "servers": [{{"address": "localhost:{port}"}}]}}')
    answer = bits(forward(flavour, f"localhost:{port}"))
    assert bits(forward(flavour, [topology])) == answer
    # An explicit name wins over the target's.
    assert bits(forward(flavour, f"experts.test:{port}", server_name="localhost")) == answer
    for target, options in (
        (f"experts.test:{port}", {}),
        (f"localhost:{port}", {"server_name": "experts.test"}),
        (f"{HOST}:{port}", {}),
    ):
        with pytest.raises(UnavailableError):
            forward(flavour, target, **options)


def test_a_group_without_tls_takes_names_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_for(monkeypatch, "experts.test.", [HOST])
    server = start({"layer": CASE}, host=HOST)
    hidden, logits = inputs(CASE)
    with stopping(server), ExpertGroup(f"experts.test.:{server.port}") as group:
        assert group.forward("layer", hidden, routing_logits=logits).output is not None
