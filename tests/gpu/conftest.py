"""One backend for all GPU tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from expertd_server.backend_cuda import CudaBackend


@pytest.fixture(scope="session")
def shared_backend() -> CudaBackend:
    from expertd_server.backend_cuda import CudaBackend

    return CudaBackend()


@pytest.fixture
def backend(shared_backend: CudaBackend) -> Iterator[CudaBackend]:
    """The shared backend, its scratch memory full of NaN, with no family forced."""
    shared_backend.poison_workspaces()
    yield shared_backend
    shared_backend.force_family = None
