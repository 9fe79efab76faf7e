"""One server for the tests that do not steer it; those that do start their own with `serving.running`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import Running, running


@pytest.fixture(scope="module")
def live() -> Iterator[Running]:
    """A server of two tiny layers on the CPU."""
    with running(metrics_port=0, expert_token_metrics=True) as server:
        yield server
