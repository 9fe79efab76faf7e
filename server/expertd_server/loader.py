"""From options to layers that are ready to run."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from expertd_server.backend import Backend
from expertd_server.calibration import read_calibration
from expertd_server.checkpoint import Checkpoint, open_checkpoint
from expertd_server.config import Config
from expertd_server.errors import ConfigError
from expertd_server.layer import MoELayer
from expertd_server.synthetic import synthetic_layers
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

__all__ = ["load_layers"]

log = logging.getLogger(__name__)


def load_layers(config: Config, backend: Backend) -> Iterator[MoELayer]:
    """Read and prepare every layer that the options name, one at a time.

    Raises ConfigError when they name none, and CheckpointError naming the tensor that cannot be served.
    """
    if config.checkpoint is None and config.synthetic is None:
        raise ConfigError("there is nothing to serve, expected --checkpoint PATH or --synthetic PRESET")
    for name, spec, weights in _sources(config):
        try:
            prepared = backend.prepare(spec, weights, max_num_tokens=config.max_batch_tokens)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"layer {name!r} cannot run on the {backend.name} backend: {error}") from error
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"layer {name!r} does not fit into the memory of {backend.device}; hold fewer layers (--layers) or "
                f"experts (--experts) here"
            ) from error
        if config.tune_kernels:
            log.info("tuning %s: %s", name, backend.tune(prepared, config.max_batch_tokens) or "nothing to choose")
        yield MoELayer(name, prepared, backend, config.weights_version, weights.fingerprint())


def _sources(config: Config) -> Iterator[tuple[str, LayerSpec, ExpertWeights]]:
    experts = config.expert_range
    if config.checkpoint is not None:
        yield from _from_checkpoint(config, config.checkpoint, experts)
    if config.synthetic is not None:
        yield from synthetic_layers(
            config.synthetic,
            config.synthetic_layers,
            local_expert_offset=experts.start if experts else 0,
            local_num_experts=len(experts) if experts else None,
            seed=config.synthetic_seed,
        )


def _from_checkpoint(
    config: Config, path: Path, experts: range | None
) -> Iterator[tuple[str, LayerSpec, ExpertWeights]]:
    checkpoint = open_checkpoint(path)
    names = _chosen(checkpoint.layer_names, config.layers, path)
    calibration = None if config.calibration is None else read_calibration(config.calibration)
    with _progress(checkpoint, names, experts) as advance:
        for name in names:
            log.info("reading %s from %s", name, path)
            yield name, *checkpoint.load(name, experts, calibration, advance)


def _chosen(held: list[str], patterns: tuple[str, ...], path: Path) -> list[str]:
    for pattern in patterns:
        if not fnmatch.filter(held, pattern):
            raise ConfigError(
                f"layers names {pattern!r}, but {path} holds no such MoE layer; it holds {', '.join(held) or 'none'}"
            )
    if not held:
        raise ConfigError(f"checkpoint {path} holds no MoE layer")
    return [name for name in held if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def _progress(
    checkpoint: Checkpoint, names: list[str], experts: range | None
) -> AbstractContextManager[Callable[[int], None] | None]:
    """A progress bar on a terminal, nothing elsewhere: a bar in a log file is noise."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return nullcontext()
    return _Bar(console, sum(checkpoint.nbytes(name, experts) for name in names))


class _Bar(AbstractContextManager[Callable[[int], None]]):
    def __init__(self, console: Console, total_bytes: int) -> None:
        columns = (TextColumn("reading weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("read", total=total_bytes)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        return lambda num_bytes: self._progress.advance(self._task, num_bytes)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
