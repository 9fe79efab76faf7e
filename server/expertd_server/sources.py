"""Where the weights of one layer come from, as LoadLayer names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from expertd.v1 import expertd_pb2 as pb
from expertd_server.calibration import read_calibration
from expertd_server.checkpoint import open_checkpoint
from expertd_server.errors import CheckpointError, ConfigError, InvalidArgumentError
from expertd_server.synthetic import synthetic_spec, synthetic_weights
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

__all__ = ["Source", "source_of"]

# A path is repeated in error messages, which travel in size-limited gRPC metadata.
_MAX_PATH_LENGTH = 1024


class Source(Protocol):
    """One layer's weights, not read yet."""

    spec: LayerSpec
    """What they will be."""

    def load(self, progress: Callable[[int], None]) -> ExpertWeights:
        """Read them. progress: called with a number of bytes now and then; what it raises ends the reading."""
        ...


def source_of(request: pb.LoadLayerRequest, experts: range | None) -> Source:
    """What a request names. experts: global ids to read; None: all.

    Raises InvalidArgumentError naming the field that names nothing.
    """
    match request.WhichOneof("source"):
        case "checkpoint":
            return _CheckpointSource(request.layer, request.checkpoint, experts)
        case "synthetic":
            return _SyntheticSource(request.synthetic, experts)
        case _:
            raise InvalidArgumentError.of("source", "is missing, expected checkpoint or synthetic")


class _CheckpointSource:
    def __init__(self, layer: str, source: pb.CheckpointSource, experts: range | None) -> None:
        path = _existing("checkpoint.path", source.path)
        try:
            self._checkpoint = open_checkpoint(path)
        except (CheckpointError, OSError) as error:
            raise InvalidArgumentError.of("checkpoint.path", str(error)) from error
        try:
            self.spec = self._checkpoint.spec(layer, experts)
        except CheckpointError as error:
            raise InvalidArgumentError.of("layer", str(error)) from error
        self._calibration = None
        if source.calibration_path:
            calibration_path = _existing("checkpoint.calibration_path", source.calibration_path)
            try:
                self._calibration = read_calibration(calibration_path)
            except (CheckpointError, OSError) as error:
                raise InvalidArgumentError.of("checkpoint.calibration_path", str(error)) from error
        self._layer = layer
        self._experts = experts

    def load(self, progress: Callable[[int], None]) -> ExpertWeights:
        """See `Source`. Raises CheckpointError naming the tensor."""
        return self._checkpoint.load(self._layer, self._experts, self._calibration, progress)[1]


class _SyntheticSource:
    def __init__(self, source: pb.SyntheticSource, experts: range | None) -> None:
        offset, count = (experts.start, len(experts)) if experts else (0, None)
        try:
            self.spec = synthetic_spec(source.preset, offset, count)
        except ConfigError as error:
            raise InvalidArgumentError.of("synthetic.preset", str(error)) from error
        self._seed, self._layer_index = source.seed, source.layer_index

    def load(self, progress: Callable[[int], None]) -> ExpertWeights:
        """See `Source`."""
        return synthetic_weights(self.spec, self._seed, self._layer_index, progress)


def _existing(field: str, path: str) -> Path:
    if len(path) > _MAX_PATH_LENGTH:
        raise InvalidArgumentError.of(field, f"has {len(path)} characters, expected at most {_MAX_PATH_LENGTH}")
    if not Path(path).is_absolute():
        raise InvalidArgumentError.of(field, f"is {path!r}, expected an absolute path on the server's disk")
    try:
        exists = Path(path).exists()
    except OSError as error:
        raise InvalidArgumentError.of(field, f"{path} cannot be opened: {error.strerror}") from error
    if not exists:
        raise InvalidArgumentError.of(field, f"is {path!r}, which is not on the server's disk")
    return Path(path)
