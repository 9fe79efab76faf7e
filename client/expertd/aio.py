"""The asynchronous client: the same methods as the synchronous one, on asyncio."""

from __future__ import annotations

import asyncio
import builtins
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from expertd._arena import Bytes
from expertd._base import (
    GET_LAYER,
    GET_SERVER_INFO,
    HEALTH_CHECK,
    LIST_LAYERS,
    READY_POLL_S,
    BaseClient,
    Outcome,
    channel_credentials,
    channel_options,
    health_service,
    layer_info,
)
from expertd._plan import Part, Plan, PreparedRequest, prepare
from expertd._transport_aio import (
    AsyncStreamTransport,
    AsyncTransport,
    AsyncUnaryTransport,
    caller_is_cancelled,
    error_from_aio,
)
from expertd.aio_prepared import AsyncPreparedForward
from expertd.config import ClientConfig
from expertd.errors import (
    ClosedError,
    ExpertdError,
    InvalidRequestError,
    LayerNotFoundError,
    TimeoutError,
    UnavailableError,
)
from expertd.tensors import NewArray
from expertd.types import Array, ArrayT, ForwardRequest, ForwardResult, LayerInfo, ServerInfo
from expertd.v1 import expertd_pb2 as pb

__all__ = ["AsyncClient"]

MessageT = TypeVar("MessageT", bound=Message)
ResultT = TypeVar("ResultT")


class AsyncClient(BaseClient):
    """A connection to an expertd server, for asyncio. Belongs to the event loop that first uses it.

        async with expertd.AsyncClient("localhost:50051") as client:
            result = await client.forward("model.layers.0", hidden_states, routing_logits=router_logits)

    Opens its connections when they are first needed. Close it, or use it as a context manager.
    """

    def __init__(self, config: ClientConfig | str) -> None:
        """config: a ClientConfig, or a target such as "localhost:50051" with every option at its default.

        Raises ConfigError naming the option that cannot be used.
        """
        super().__init__(config)
        self._credentials = channel_credentials(self.config)
        self._places = asyncio.Semaphore(self.config.max_in_flight)
        self._closed = asyncio.Event()
        # gRPC ties a channel to the running event loop, which there need not be yet.
        self._channels: Sequence[grpc.aio.Channel] = ()
        self._transport: AsyncTransport | None = None

    async def forward(
        self,
        layer: str,
        hidden_states: ArrayT,
        *,
        routing_logits: Array | None = None,
        topk_ids: Array | None = None,
        topk_weights: Array | None = None,
        output_dtype: Any = None,
        do_finalize: bool = True,
        return_routing: bool = False,
        weights_version: int | None = None,
        timeout_s: float | None = None,
        out: ArrayT | None = None,
    ) -> ForwardResult[ArrayT]:
        """Run one layer on the caller's tokens. The arguments are the fields of ForwardRequest.

        Takes either routing_logits or topk_ids with topk_weights. More tokens than the server takes at once are sent in
        parts and joined. Raises ExpertdError: see `expertd.errors`.
        """
        return await self._forward(
            ForwardRequest(
                layer=layer,
                hidden_states=hidden_states,
                routing_logits=routing_logits,
                topk_ids=topk_ids,
                topk_weights=topk_weights,
                output_dtype=output_dtype,
                do_finalize=do_finalize,
                return_routing=return_routing,
                weights_version=weights_version,
                timeout_s=timeout_s,
                out=out,
            )
        )

    async def prepare(self, request: ForwardRequest[ArrayT]) -> AsyncPreparedForward[ArrayT]:
        """A forward to make many times, on these arrays and what they hold by then: `await` its `run`.

        The request is checked here once. Leave the arrays' shapes and memory as they are, what they hold is read at
        each call. Asks the server for the layer where it is not known. Raises ExpertdError: see `expertd.errors`.
        """
        deadline = self._deadline(request.timeout_s)
        prepared = AsyncPreparedForward(self, request)
        prepared.stand(await self._make_plan(prepared.checked, deadline))
        return prepared

    @overload
    def forward_many(
        self,
        requests: Iterable[ForwardRequest[ArrayT]] | AsyncIterable[ForwardRequest[ArrayT]],
        *,
        return_exceptions: Literal[False] = False,
    ) -> AsyncIterator[ForwardResult[ArrayT]]: ...
    @overload
    def forward_many(
        self,
        requests: Iterable[ForwardRequest[ArrayT]] | AsyncIterable[ForwardRequest[ArrayT]],
        *,
        return_exceptions: bool,
    ) -> AsyncIterator[ForwardResult[ArrayT] | ExpertdError]: ...
    async def forward_many(
        self,
        requests: Iterable[ForwardRequest[ArrayT]] | AsyncIterable[ForwardRequest[ArrayT]],
        *,
        return_exceptions: bool = False,
    ) -> AsyncIterator[ForwardResult[ArrayT] | ExpertdError]:
        """Run many requests, several on the wire at a time, and yield their results in the order of the requests.

        At most max_in_flight requests are ahead of the result that is read next: a slow reader slows the sending down.
        A failure is raised in its place and ends the iteration; with return_exceptions it is yielded instead. Results
        do not wait for what an asynchronous iterable has yet to come; of any other, so many requests are taken first.
        """
        ahead: deque[asyncio.Task[ForwardResult[ArrayT]]] = deque()
        feeder: asyncio.Task[None] | None = None
        places, has_news = asyncio.Semaphore(self.config.max_in_flight), asyncio.Event()

        async def feed(coming: AsyncIterator[ForwardRequest[ArrayT]]) -> None:
            try:
                while True:
                    await places.acquire()
                    ahead.append(asyncio.create_task(self._forward(await anext(coming))))
                    has_news.set()
            except StopAsyncIteration:
                return
            finally:
                has_news.set()

        async def next_result() -> ForwardResult[ArrayT] | ExpertdError:
            try:
                return await ahead[0]
            except ExpertdError as error:
                if not return_exceptions:
                    raise
                return error
            finally:
                ahead.popleft()

        try:
            if isinstance(requests, AsyncIterable):
                feeder = asyncio.create_task(feed(aiter(requests)), name="expertd-forward-many")
                while True:
                    while not ahead and not feeder.done():
                        has_news.clear()
                        await has_news.wait()
                    if not ahead:
                        feeder.result()  # raises what the iterable has
                        return
                    result = await next_result()
                    places.release()
                    yield result
            for request in requests:
                ahead.append(asyncio.create_task(self._forward(request)))
                if len(ahead) == self.config.max_in_flight:
                    yield await next_result()
            while ahead:
                yield await next_result()
        finally:
            await _cancel(ahead if feeder is None else (*ahead, feeder))

    async def empty(self, shape: int | Sequence[int], dtype: Any, *, timeout_s: float | None = None) -> Any:
        """An array, not initialised, in the memory that is shared with the server, where that has some.

        What lies there as a whole is not copied on its way to the server, nor is the output on its way to `out`. The
        memory is reserved as long as the array or a view of it is there. Where none is shared, or half of it is taken,
        this is an ordinary array, which serves as well; so does one whose stream has ended since.

        shape: as numpy takes it. dtype: one that goes on the wire, as a name ("bfloat16") or a numpy dtype for a numpy
        array, as a torch dtype for a tensor on the host. Connects if need be. Raises ExpertdError: see
        `expertd.errors`.
        """
        array = NewArray(shape, dtype)
        return array.on(await self._lend(array.nbytes, self._deadline(timeout_s)))

    async def layers(self, *, timeout_s: float | None = None) -> list[LayerInfo]:
        """Every layer that the server holds, sorted by name."""
        response = await self._call(
            LIST_LAYERS, pb.ListLayersRequest(), pb.ListLayersResponse, self._deadline(timeout_s)
        )
        return [layer_info(message) for message in response.layers]

    async def layer(self, name: str, *, timeout_s: float | None = None) -> LayerInfo:
        """One layer by name. Raises LayerNotFoundError when the server does not hold it."""
        return await self._fetch_layer(name, self._deadline(timeout_s))

    async def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """What the server is, what it runs on and what it accepts."""
        return await self._fetch_server(self._deadline(timeout_s))

    async def wait_ready(self, layer: str | None = None, *, timeout_s: float | None = None) -> None:
        """Return when the server, or one layer of it, answers requests. Raises TimeoutError when it is late."""
        timeout_s = self._timeout_s(timeout_s)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        what = "the server" if layer is None else f"layer {layer!r}"
        last = "no answer"
        while True:
            try:
                status = await self._health(health_service(layer), deadline)
                if status == health_pb2.HealthCheckResponse.SERVING:
                    return
                last = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
            except (UnavailableError, LayerNotFoundError) as error:
                last = str(error)
            except TimeoutError:
                pass  # the deadline check below says what was seen last
            if loop.time() + READY_POLL_S >= deadline:
                raise TimeoutError(f"{what} was not ready within {timeout_s:g} s; last seen: {last}")
            await self._pause(READY_POLL_S)

    async def close(self) -> None:
        """Fail what is in flight with ClosedError, end the client's tasks and close its connections."""
        self._closed.set()
        if self._transport is not None:
            await self._transport.close()
        for channel in self._channels:
            await channel.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _forward(
        self,
        request: ForwardRequest[ArrayT],
        prepared: PreparedRequest | None = None,
        deadline: float | None = None,
    ) -> ForwardResult[ArrayT]:
        """prepared: the request, where that is checked already. deadline: where some of its time is gone already."""
        timeout_s = self._timeout_s(request.timeout_s)
        if deadline is None:
            deadline = asyncio.get_running_loop().time() + timeout_s
        scope = asyncio.timeout_at(deadline)
        try:
            async with scope:
                plan = await self._make_plan(prepared or prepare(request), deadline)
                while parts := plan.unanswered():
                    await _all([self._run(plan, index, part, deadline) for index, part in parts.items()])
                result: ForwardResult[ArrayT] = plan.result()
                return result
        except builtins.TimeoutError as error:
            if scope.expired():
                raise TimeoutError(f"no answer within {timeout_s:g} s") from error
            raise
        finally:
            del scope  # it knows the task, which may end with an error that knows this frame: leave no cycle

    async def _resume(self, plan: Plan, deadline: float, failure: ExpertdError) -> ForwardResult[Any]:
        """Go on with a request of one part that was sent and has failed."""
        ((index, part),) = plan.unanswered().items()
        run = self._run(plan, index, part, deadline, failure)
        del failure  # it will know this frame: leave no cycle
        await run
        return plan.result()

    async def _run(
        self, plan: Plan, index: int, part: Part, deadline: float, failure: ExpertdError | None = None
    ) -> None:
        """Send one part until it is answered. failure: what has come of it before."""
        retries = self._retries(deadline)
        outcome: Outcome | None = failure
        while True:
            if outcome is None:
                async with self._places:
                    outcome = await self._connected().forward(part.encode(), deadline)
            if not isinstance(outcome, ExpertdError):
                return plan.answer(index, outcome)
            self._forget(outcome)
            delay = retries.delay_s(outcome, asyncio.get_running_loop().time())
            if delay is None:
                try:
                    raise outcome
                finally:
                    del outcome, failure  # it knows this frame: leave no cycle, which would keep the caller's arrays
            outcome = failure = None
            await self._pause(delay)

    async def _make_plan(self, request: PreparedRequest, deadline: float) -> Plan:
        server = self._known_server or await self._fetch_server(deadline)
        layer = self._known_layers.get(request.layer)
        try:
            if layer is not None:
                request.check_layer(layer)
        except InvalidRequestError:
            layer = None  # what was known may be old: ask before turning the caller away
        if layer is None:
            layer = await self._fetch_layer(request.layer, deadline)
            request.check_layer(layer)
        return self._plan(request, server, layer)

    async def _fetch_server(self, deadline: float) -> ServerInfo:
        return self._learn_server(
            await self._call(GET_SERVER_INFO, pb.GetServerInfoRequest(), pb.GetServerInfoResponse, deadline)
        )

    async def _fetch_layer(self, name: str, deadline: float) -> LayerInfo:
        response = await self._call(GET_LAYER, pb.GetLayerRequest(layer=name), pb.GetLayerResponse, deadline)
        return self._learn_layer(response.layer)

    async def _health(self, service: str, deadline: float) -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await self._call_once(
            HEALTH_CHECK, request, health_pb2.HealthCheckResponse, deadline, wait_for_ready=True
        )
        return int(answer.status)

    async def _lend(self, nbytes: int, deadline: float) -> Bytes | None:
        """Memory for `empty`; None: there is none to share, or none to spare."""
        if self._wanted_memory is None:
            return None
        scope = asyncio.timeout_at(deadline)
        try:
            async with scope:
                if self._known_server is None:
                    await self._fetch_server(deadline)
                return await self._retried(deadline, lambda: self._connected().lend(nbytes))
        except builtins.TimeoutError as error:
            if scope.expired():
                raise TimeoutError("the server had not taken the shared memory by the deadline") from error
            raise
        finally:
            del scope  # it knows the task, which may end with an error that knows this frame: leave no cycle

    async def _call(self, method: str, request: Message, response: type[MessageT], deadline: float) -> MessageT:
        """A small unary call, retried."""
        return await self._retried(deadline, lambda: self._call_once(method, request, response, deadline))

    async def _retried(self, deadline: float, once: Callable[[], Coroutine[Any, Any, ResultT]]) -> ResultT:
        """What `once` returns, called again while its errors leave hope."""
        retries = self._retries(deadline)
        while True:
            try:
                return await once()
            except ExpertdError as error:
                self._forget(error)
                delay = retries.delay_s(error, asyncio.get_running_loop().time())
                if delay is None:
                    raise
            await self._pause(delay)

    async def _call_once(
        self, method: str, request: Message, response: type[MessageT], deadline: float, *, wait_for_ready: bool = False
    ) -> MessageT:
        self._connected()
        metadata, request_id = self._metadata()
        ask: Any = self._channels[0].unary_unary(method, type(request).SerializeToString, response.FromString)
        timeout_s = deadline - asyncio.get_running_loop().time()
        call = ask(request, timeout=timeout_s, metadata=metadata, wait_for_ready=wait_for_ready)
        try:
            answer: MessageT = await call
            return answer
        except grpc.RpcError as error:
            raise await error_from_aio(call, request_id) from error
        except asyncio.CancelledError as error:
            if self._closed.is_set() and not caller_is_cancelled():
                raise ClosedError("the client was closed") from error
            raise

    def _connected(self) -> AsyncTransport:
        if self._closed.is_set():
            raise ClosedError("the client is closed")
        if self._transport is None:
            config = self.config
            self._channels = [
                grpc.aio.insecure_channel(config.target, channel_options(config, index))
                if self._credentials is None
                else grpc.aio.secure_channel(config.target, self._credentials, channel_options(config, index))
                for index in range(config.num_channels)
            ]
            self._transport = (
                AsyncUnaryTransport(self._channels, self._metadata)
                if config.transport == "unary"
                else AsyncStreamTransport(self._channels, self._metadata, self._unwanted, self._wanted_memory)
            )
        return self._transport

    async def _pause(self, delay_s: float) -> None:
        """Wait, unless the client is closed meanwhile."""
        try:
            await asyncio.wait_for(self._closed.wait(), delay_s)
        except builtins.TimeoutError:
            return
        raise ClosedError("the client was closed")

    def _deadline(self, timeout_s: float | None) -> float:
        return asyncio.get_running_loop().time() + self._timeout_s(timeout_s)


async def _all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all; when one fails, cancel the others and raise its error."""
    if len(work) == 1:
        return await work[0]
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)
        tasks.clear()  # an error knows this frame, and its task the error: leave no cycle


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
