"""expertd-server: a mixture-of-experts layer with FP8 per-tensor scales, served over gRPC."""

from __future__ import annotations

from importlib.metadata import version

__all__ = ["__version__"]
__version__ = version("expertd-server")
