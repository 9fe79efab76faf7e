"""A front-end computes nothing, so it shall not pay for what computes: torch takes seconds to import, and memory."""

from __future__ import annotations

import json
import subprocess
import sys

TIMEOUT_S = 100.0


def modules_after(statement: str) -> set[str]:
    """Packages that a fresh interpreter has imported after a statement."""
    code = f"{statement}; import json, sys; print(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return set(json.loads(done.stdout))


def test_a_front_end_has_no_torch() -> None:
    found = modules_after("import expertd_server.child, expertd_server.frontend")
    assert "grpc" in found, "it speaks gRPC"
    assert not found & {"torch", "safetensors"}


def test_who_starts_front_ends_has_none_of_the_large_ones() -> None:
    found = modules_after("import expertd_server.supervisor")
    assert not found & {"torch", "grpc", "numpy"}
