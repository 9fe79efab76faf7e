"""expertd-server: a mixture-of-experts layer with FP8 per-tensor scales, served over gRPC."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]
try:
    __version__ = version("expertd-server")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+source"
