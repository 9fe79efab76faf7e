"""Four rules for all tests.

A test marked `gpu` is skipped, with its reason, where no GPU can run it. And torch uses one thread, here and in every
process that a test starts: the shapes of tests are so small that two threads which wait for one another cost three
times the processor time. Tests of what more threads do to the CPU backend ask for `two_threads`, which wait asleep.
What a test does to the root logger, as a server does that runs in this process, ends with the test.
And a run ends with what it left out, by reason: see skip_summary.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import pytest
from skip_summary import pytest_terminal_summary  # noqa: F401 (a hook: pytest looks for it here)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is first imported

import torch

from expertd_server import cpu_experts

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """torch uses two threads in this process, as the CPU backend does on a machine of two cores."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=["compiled", "torch"])
def experts_run_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU backend's experts run in compiled code, where this CPU can, and once more through torch."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_experts, "find_unit", lambda: None)
    elif cpu_experts.find_unit() is None:
        pytest.skip(f"needs compiled experts: {cpu_experts.how(None)}")


@pytest.fixture(params=list(cpu_experts.Unit), ids=lambda unit: unit.name)
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> cpu_experts.Unit:
    """The CPU backend's experts run in compiled code on each unit that this CPU has."""
    if reason := cpu_experts.why_not(request.param):
        pytest.skip(f"needs the unit {request.param.name}: {reason}")
    monkeypatch.setattr(cpu_experts, "find_unit", lambda: request.param)
    return request.param


@pytest.fixture(params=[*cpu_experts.Unit, None], ids=lambda unit: unit.name if unit else "torch")
def experts_run_by_each(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As experts_run_by, but on each unit: for tests of what the products do."""
    if request.param is not None and (reason := cpu_experts.why_not(request.param)):
        pytest.skip(f"needs the unit {request.param.name}: {reason}")
    monkeypatch.setattr(cpu_experts, "find_unit", lambda: request.param)


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """The root logger's level and handlers as they were: a server in this process sets them for its life."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)


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
