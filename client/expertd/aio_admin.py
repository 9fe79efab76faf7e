"""The asynchronous admin client: the same methods as the synchronous one, on asyncio."""

from __future__ import annotations

import asyncio
from pathlib import PurePath
from types import TracebackType
from typing import TypeVar

from google.protobuf.message import Message

from expertd._admin_base import (
    DRAIN,
    LOAD_LAYER,
    LOAD_TIMEOUT_S,
    SWAP_WEIGHTS,
    UNLOAD_LAYER,
    call_timeout_s,
    load_request,
    loaded,
    swapped,
    unloaded,
    version,
    wait_ms,
)
from expertd.aio import AsyncClient
from expertd.config import ClientConfig
from expertd.types import LoadedVersion, SwappedVersion, UnloadedVersion
from expertd.v1 import expertd_pb2 as pb

__all__ = ["AsyncAdminClient"]

MessageT = TypeVar("MessageT", bound=Message)


class AsyncAdminClient:
    """A connection to the admin port of a server (its option --admin). Belongs to the event loop that first uses it.

        async with expertd.AsyncAdminClient("localhost:50052") as admin:
            await admin.load_layer("model.layers.0", 2, checkpoint="/models/step-2000")
            await admin.swap_weights("model.layers.0", 2)
            await admin.unload_layer("model.layers.0", 1)

    Every order is sent once: an error says that it was refused, or that its outcome is not known, and
    `AsyncClient.layer` of the data port says what is held. Errors are those of `expertd.errors`.
    """

    def __init__(self, config: ClientConfig | str) -> None:
        """config: a ClientConfig, or a target such as "localhost:50052" with every option at its default."""
        self._client = AsyncClient(config)

    async def load_layer(
        self,
        layer: str,
        weights_version: int,
        *,
        checkpoint: str | PurePath | None = None,
        calibration: str | PurePath | None = None,
        synthetic: str | None = None,
        synthetic_seed: int = 0,
        synthetic_layer_index: int = 0,
        timeout_s: float | None = None,
    ) -> LoadedVersion:
        """Read a version of a layer's weights and hold it beside the others; the current version stays current.

        checkpoint, calibration: absolute paths on the server's disk; or synthetic: the name of a preset.
        timeout_s: None: an hour. When it passes, loading stops and nothing of it remains.
        Raises OrderRefusedError when the version is held already, the checkpoint is broken or memory does not suffice,
        InvalidRequestError naming the field, OverloadedError while another load runs.
        """
        request = load_request(
            layer,
            weights_version,
            checkpoint=checkpoint,
            calibration=calibration,
            synthetic=synthetic,
            synthetic_seed=synthetic_seed,
            synthetic_layer_index=synthetic_layer_index,
        )
        timeout_s = LOAD_TIMEOUT_S if timeout_s is None else self._client._timeout_s(timeout_s)
        return loaded(await self._call(LOAD_LAYER, request, pb.LoadLayerResponse, timeout_s))

    async def swap_weights(self, layer: str, weights_version: int, *, timeout_s: float | None = None) -> SwappedVersion:
        """Make a version that is held the current one, for every request admitted from now on that names none.

        The one before stays held. Raises LayerNotFoundError, VersionNotHeldError.
        """
        request = pb.SwapWeightsRequest(layer=layer, weights_version=version(weights_version))
        timeout_s = self._client._timeout_s(timeout_s)
        return swapped(await self._call(SWAP_WEIGHTS, request, pb.SwapWeightsResponse, timeout_s))

    async def unload_layer(
        self, layer: str, weights_version: int | None = None, *, timeout_s: float | None = None
    ) -> UnloadedVersion:
        """Give up a version that is not current; None: the layer with all its versions.

        Waits up to timeout_s (None: the client's) for the requests that use it, then frees its memory.
        Raises LayerNotFoundError, VersionNotHeldError, and OrderRefusedError for the current version.
        """
        timeout_s = self._client._timeout_s(timeout_s)
        which = 0 if weights_version is None else version(weights_version)
        request = pb.UnloadLayerRequest(layer=layer, weights_version=which, timeout_ms=wait_ms(timeout_s))
        return unloaded(await self._call(UNLOAD_LAYER, request, pb.UnloadLayerResponse, call_timeout_s(timeout_s)))

    async def drain(self, *, timeout_s: float | None = None) -> bool:
        """Have the server take no new requests and answer those it has, for good: only a restart makes it serve again.

        Waits up to timeout_s (None: the client's); whether everything was answered by then.
        """
        timeout_s = self._client._timeout_s(timeout_s)
        request = pb.DrainRequest(timeout_ms=wait_ms(timeout_s))
        return (await self._call(DRAIN, request, pb.DrainResponse, call_timeout_s(timeout_s))).idle

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()

    async def __aenter__(self) -> AsyncAdminClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: str, request: Message, response: type[MessageT], timeout_s: float) -> MessageT:
        return await self._client._call_once(method, request, response, asyncio.get_running_loop().time() + timeout_s)
