"""How much memory there is for tensors, see also test_host_memory."""

from __future__ import annotations

import torch

from expertd_server.memory import free_bytes


def test_this_machine_has_some() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is not None
    assert 0 < free < 2**50
