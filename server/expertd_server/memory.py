"""How much memory there is for weights that are to be loaded beside others."""

from __future__ import annotations

import torch

from expertd_server.host_memory import available_memory_bytes

__all__ = ["free_bytes"]


def free_bytes(device: torch.device) -> int | None:
    """Bytes of memory that tensors of a device could still take; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps of tensors that are gone is as good as free.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_memory_bytes()
