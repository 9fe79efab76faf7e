"""The engine of another process: calls go through a channel of shared memory, answers come back the same way.

`RemoteEngine` is what a front-end has in place of an `Engine`; `EngineGate` is what the engine's process has for its
front-ends. Deadlines are absolute times of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import itertools
import json
import logging
import select
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final

from expertd_server.blocks import block_bytes, read_answer, read_request, write_answer, write_error, write_request
from expertd_server.engine import ForwardCall, ForwardResult
from expertd_server.errors import ExpertdServerError, OverloadedError, UnavailableError
from expertd_server.ring import Arena, Block, Channel, Descriptor, Ring
from expertd_server.store import LayerStore

__all__ = ["EngineGate", "RemoteEngine"]

log = logging.getLogger(__name__)

_SUBMIT: Final = 1
_CANCEL: Final = 2
_ANSWER: Final = 3

# Threads look up this often whether they shall end; nothing else depends on it.
_LOOK_UP_MS: Final = 1000
# What a caller is told who finds the arena full: some answers will have been read by then.
_FULL_RETRY_DELAY_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class _BlockResult(ForwardResult):
    """An answer whose tensors are views of a block; the block is free again when this is gone."""

    block: Block | None = None


@dataclass(slots=True)
class _Waiting:
    future: Future[ForwardResult]
    block: Block


class RemoteEngine:
    """Submits calls to the engine at the other end of a channel, while there is one; thread-safe.

    channel: this process' end, as made for `max_requests`. on_message: called with each control message (a JSON value).
    on_end: called once, when the engine's end is gone and every call in flight has failed with UnavailableError.
    """

    def __init__(
        self,
        channel: Channel,
        max_requests: int,
        *,
        on_message: Callable[[Any], None],
        on_end: Callable[[], None],
    ) -> None:
        self._to_engine, self._from_engine, memory = channel.open(max_requests)
        self._arena = Arena(memory)
        self._control = Connection(channel.control_fd)
        self._max_requests = max_requests
        self._on_message = on_message
        self._on_end = on_end
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._is_open = True
        self._queue_tokens = 0
        self._thread = threading.Thread(target=self._read, name="expertd-ring-reader", daemon=True)
        self._thread.start()

    @property
    def queue_tokens(self) -> int:
        """Tokens that waited in the engine when the last answer was made."""
        return self._queue_tokens

    @property
    def arena_free_bytes(self) -> int:
        """Bytes of the arena that no request holds."""
        return self._arena.free_bytes()

    def submit(self, call: ForwardCall, deadline_s: float | None = None) -> Future[ForwardResult]:
        """Queue a call, as `Engine.submit` does; what the engine refuses fails the future.

        Raises OverloadedError when too much is in flight here, and UnavailableError when the engine is gone.
        """
        block = self._arena.allocate(block_bytes(call))
        if block is None:
            raise OverloadedError(
                f"requests in flight fill the {self._arena.nbytes} bytes that this front-end shares with the engine "
                f"(frontend_arena_bytes); come back in {_FULL_RETRY_DELAY_S} s",
                _FULL_RETRY_DELAY_S,
            )
        write_request(block.view, call, deadline_s)
        future: Future[ForwardResult] = Future()
        with self._lock:
            if not self._is_open:
                raise _gone()
            if len(self._waiting) >= self._max_requests:
                raise OverloadedError(
                    f"{len(self._waiting)} requests of this front-end are in flight, at most {self._max_requests} may "
                    f"be; come back in {_FULL_RETRY_DELAY_S} s",
                    _FULL_RETRY_DELAY_S,
                )
            request_id = next(self._ids)
            self._waiting[request_id] = _Waiting(future, block)
            self._to_engine.publish(_SUBMIT, request_id, block.offset, block.nbytes)
        future.add_done_callback(lambda done: self._cancel(request_id) if done.cancelled() else None)
        return future

    def send(self, message: Any) -> None:
        """Send a control message; without effect when the engine is gone."""
        with self._lock:
            if self._is_open:
                _send(self._control, message)

    def close(self) -> None:
        """Leave the engine; calls in flight fail with UnavailableError."""
        with self._lock:
            self._is_open = False
        self._thread.join()
        self._control.close()

    def _cancel(self, request_id: int) -> None:
        with self._lock:
            # The block stays the engine's until it answers: it may be reading it.
            if self._is_open and request_id in self._waiting:
                self._to_engine.publish(_CANCEL, request_id)

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._from_engine.eventfd, select.POLLIN)
        poll.register(self._control.fileno(), select.POLLIN)
        try:
            while self._is_open:
                for fd, _ in poll.poll(_LOOK_UP_MS):
                    if fd == self._from_engine.eventfd:
                        for descriptor in self._from_engine.take():
                            self._answered(descriptor)
                    else:
                        self._on_message(json.loads(self._control.recv_bytes()))
        except (EOFError, OSError):
            pass  # the engine's process ended
        for descriptor in self._from_engine.take():  # what it had answered before
            self._answered(descriptor)
        with self._lock:
            self._is_open = False
            left, self._waiting = list(self._waiting.values()), {}
        for waiting in left:
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_exception(_gone())
        self._on_end()

    def _answered(self, descriptor: Descriptor) -> None:
        with self._lock:
            waiting = self._waiting.pop(descriptor.request_id)
        answer, self._queue_tokens = read_answer(waiting.block.view)
        if not waiting.future.set_running_or_notify_cancel():
            return
        if isinstance(answer, ExpertdServerError):
            waiting.future.set_exception(answer)
        else:
            fields = {name: getattr(answer, name) for name in ForwardResult.__slots__}
            waiting.future.set_result(_BlockResult(**fields, block=waiting.block))


class EngineGate:
    """Where the calls of all front-ends arrive in the engine's process: one thread reads every channel.

    submit, queue_tokens: of the engine. on_message: called with a front-end's name and each of its control messages.
    """

    def __init__(
        self,
        submit: Callable[[ForwardCall, float | None], Future[ForwardResult]],
        queue_tokens: Callable[[], int],
        store: LayerStore,
        *,
        on_message: Callable[[str, Any], None],
    ) -> None:
        self._submit = submit
        self._queue_tokens = queue_tokens
        self._store = store
        self._on_message = on_message
        self._lock = threading.Lock()
        self._peers: dict[int, _Peer] = {}
        """By each of their two file descriptors."""
        self._poll = select.epoll()
        self._is_open = True
        self._thread = threading.Thread(target=self._loop, name="expertd-ring-gate", daemon=True)
        self._thread.start()

    def connect(self, name: str, channel: Channel, max_requests: int) -> None:
        """Serve a front-end. channel: this process' end, as made for `max_requests`."""
        peer = _Peer(name, channel, max_requests)
        with self._lock:
            for fd in peer.fds:
                self._peers[fd] = peer
                self._poll.register(fd, select.EPOLLIN)
        log.info("front-end %s is connected", name)

    def send_all(self, message: Any) -> None:
        """Send a control message to every front-end."""
        with self._lock:
            peers = set(self._peers.values())
        for peer in peers:
            peer.send(message)

    def close(self) -> None:
        """Stop reading."""
        self._is_open = False
        self._thread.join()
        self._poll.close()

    def _loop(self) -> None:
        while self._is_open:
            for fd, _ in self._poll.poll(_LOOK_UP_MS / 1000):
                peer = self._peers[fd]
                try:
                    if fd == peer.requests.eventfd:
                        for descriptor in peer.requests.take():
                            self._handle(peer, descriptor)
                    else:
                        self._on_message(peer.name, json.loads(peer.control.recv_bytes()))
                except (EOFError, OSError):
                    self._drop(peer)
                    break  # events of its other descriptor are stale

    def _handle(self, peer: _Peer, descriptor: Descriptor) -> None:
        if descriptor.kind == _CANCEL:
            future = peer.futures.get(descriptor.request_id)
            if future is not None:
                future.cancel()
            return
        block = peer.memory[descriptor.offset : descriptor.offset + descriptor.nbytes]
        try:
            call, deadline_s = read_request(block, self._store)
            future = self._submit(call, deadline_s)
        except Exception as error:
            self._answer(peer, descriptor.request_id, block, error)
            return
        peer.futures[descriptor.request_id] = future
        future.add_done_callback(lambda done: self._done(peer, descriptor.request_id, block, done))

    def _done(self, peer: _Peer, request_id: int, block: memoryview, future: Future[ForwardResult]) -> None:
        peer.futures.pop(request_id, None)
        error = RequestCancelled if future.cancelled() else future.exception()
        self._answer(peer, request_id, block, future.result() if error is None else error)

    def _answer(self, peer: _Peer, request_id: int, block: memoryview, answer: ForwardResult | BaseException) -> None:
        if peer.is_gone:
            return
        if isinstance(answer, ForwardResult):
            write_answer(block, answer, self._queue_tokens())
        else:
            write_error(block, answer, self._queue_tokens())
        peer.answers.publish(_ANSWER, request_id)

    def _drop(self, peer: _Peer) -> None:
        """Its process ended: forget its requests; its memory goes with the last view of it."""
        peer.is_gone = True
        with self._lock:
            for fd in peer.fds:
                self._poll.unregister(fd)
                del self._peers[fd]
        for future in list(peer.futures.values()):
            future.cancel()
        peer.control.close()
        log.warning("front-end %s is gone", peer.name)


class _Peer:
    """A front-end as the engine's process sees it."""

    def __init__(self, name: str, channel: Channel, max_requests: int) -> None:
        self.name = name
        self.requests: Ring
        self.answers: Ring
        self.requests, self.answers, self.memory = channel.open(max_requests)
        self.control = Connection(channel.control_fd)
        self.futures: dict[int, Future[ForwardResult]] = {}
        self.is_gone = False
        self._lock = threading.Lock()

    @property
    def fds(self) -> tuple[int, int]:
        """What is polled."""
        return self.requests.eventfd, self.control.fileno()

    def send(self, message: Any) -> None:
        """Send a control message; without effect when the front-end is gone."""
        with self._lock:
            if not self.is_gone:
                _send(self.control, message)


def _send(control: Connection, message: Any) -> None:
    try:
        control.send_bytes(json.dumps(message).encode())
    except OSError:
        pass  # the reader of this connection sees the end too, and acts on it


def _gone() -> UnavailableError:
    return UnavailableError("the engine process ended; come back, or try another server")
