"""What bounds a request's wait."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from expertd_server.calls import Calls
from expertd_server.metrics import Metrics


@pytest.mark.parametrize(("timeout_s", "deadline_s"), [(3.0, 103.0), (9.0, 105.0), (math.inf, 105.0)])
def test_a_request_waits_as_long_as_its_caller_says_and_the_server_allows(timeout_s: float, deadline_s: float) -> None:
    submitted: list[tuple[Any, ...]] = []
    calls = Calls(
        store=SimpleNamespace(),  # type: ignore[arg-type]
        engine=SimpleNamespace(submit=lambda *arguments: submitted.append(arguments)),  # type: ignore[arg-type]
        codec=SimpleNamespace(typed_call=lambda *_, **__: SimpleNamespace()),  # type: ignore[arg-type]
        metrics=Metrics(),
        max_batch_tokens=1,
        max_message_bytes=1,
        request_timeout_s=5.0,
    )
    calls.admit(SimpleNamespace(), 100.0, timeout_s, bytes)  # type: ignore[arg-type]
    assert submitted[0][1] == deadline_s
