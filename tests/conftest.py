"""The one rule about GPUs: a test marked `gpu` is skipped, with its reason, where no GPU can run it."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch


@functools.cache
def _no_gpu_reason() -> str | None:
    if not torch.cuda.is_available():
        return "needs an NVIDIA Hopper GPU: torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"needs an NVIDIA Hopper GPU (compute capability 9.0), found {major}.{minor}"
    if importlib.util.find_spec("expertd_server._cuda") is None:
        return "needs the compiled kernels: install with EXPERTD_CUDA=on"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _no_gpu_reason()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
