"""Everything that the synchronous and the asynchronous admin client share. No I/O."""

from __future__ import annotations

from pathlib import PurePath

from expertd._base import layer_info
from expertd.errors import InvalidRequestError
from expertd.types import LoadedVersion, SwappedVersion, UnloadedVersion
from expertd.v1 import expertd_pb2 as pb

__all__ = [
    "DRAIN",
    "LOAD_LAYER",
    "LOAD_TIMEOUT_S",
    "SWAP_WEIGHTS",
    "UNLOAD_LAYER",
    "call_timeout_s",
    "load_request",
    "loaded",
    "swapped",
    "unloaded",
    "version",
    "wait_ms",
]

_SERVICE = "/expertd.v1.AdminService"
LOAD_LAYER = f"{_SERVICE}/LoadLayer"
SWAP_WEIGHTS = f"{_SERVICE}/SwapWeights"
UNLOAD_LAYER = f"{_SERVICE}/UnloadLayer"
DRAIN = f"{_SERVICE}/Drain"

LOAD_TIMEOUT_S = 3600.0
_MAX_UINT32 = 2**32 - 1
# A server that waits as long as it was told has this long to say so.
_ANSWER_S = 5.0


def load_request(
    layer: str,
    weights_version: int,
    *,
    checkpoint: str | PurePath | None,
    calibration: str | PurePath | None,
    synthetic: str | None,
    synthetic_seed: int,
    synthetic_layer_index: int,
) -> pb.LoadLayerRequest:
    """The order of load_layer. Raises InvalidRequestError unless it names one source."""
    if (checkpoint is None) == (synthetic is None):
        raise InvalidRequestError.of("source", "is not one, expected either checkpoint or synthetic")
    request = pb.LoadLayerRequest(layer=layer, weights_version=version(weights_version))
    if checkpoint is not None:
        request.checkpoint.path = str(checkpoint)
        request.checkpoint.calibration_path = "" if calibration is None else str(calibration)
    elif synthetic is not None:
        request.synthetic.preset = synthetic
        request.synthetic.seed = _unsigned("synthetic_seed", synthetic_seed)
        request.synthetic.layer_index = _unsigned("synthetic_layer_index", synthetic_layer_index, _MAX_UINT32)
    return request


def loaded(response: pb.LoadLayerResponse) -> LoadedVersion:
    """The answer of load_layer. Raises ProtocolError like the others here."""
    return LoadedVersion(
        layer=layer_info(response.layer),
        weights_bytes=response.weights_bytes,
        load_time_s=response.load_time_ms / 1e3,
    )


def swapped(response: pb.SwapWeightsResponse) -> SwappedVersion:
    """The answer of swap_weights."""
    return SwappedVersion(layer=layer_info(response.layer), previous_weights_version=response.previous_weights_version)


def unloaded(response: pb.UnloadLayerResponse) -> UnloadedVersion:
    """The answer of unload_layer."""
    return UnloadedVersion(weights_bytes=response.weights_bytes, freed=response.freed)


def wait_ms(timeout_s: float) -> int:
    """How long the server shall wait, as the orders carry it; never 0, which would mean its default."""
    return min(max(1, round(timeout_s * 1000)), _MAX_UINT32)


def call_timeout_s(timeout_s: float) -> float:
    """Deadline of a call in which the server waits for so long."""
    return timeout_s + _ANSWER_S


def version(weights_version: int) -> int:
    """The version that an order is about. Raises InvalidRequestError for a number that no version has.

    NOTE: 0 among them, which on the wire means all versions to an order that unloads.
    """
    return _unsigned("weights_version", weights_version, least=1)


def _unsigned(name: str, value: int, most: int = 2**64 - 1, *, least: int = 0) -> int:
    if not least <= value <= most:
        raise InvalidRequestError.of(name, f"is {value}, expected {least} to {most}")
    return value
