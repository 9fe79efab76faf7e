"""The compiled kernels; importing this says what is missing where they were not built."""

from __future__ import annotations

try:
    from expertd_server import _cuda
except ImportError as error:
    raise ImportError(
        "expertd_server was installed without its CUDA extension: install it where nvcc 12.5 or newer is on the PATH "
        "(EXPERTD_CUDA=on makes a missing compiler an error), or use the CPU backend"
    ) from error

__all__ = ["_cuda"]
