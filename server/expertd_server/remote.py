"""A front-end's end of the way to the engine's process: what stands in place of an `Engine` there.

Deadlines are absolute times of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import pickle
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from google.rpc import status_pb2

from expertd_server.blocks import block_bytes, read_error, write_call
from expertd_server.control import Control
from expertd_server.errors import (
    ExpertdServerError,
    InvalidArgumentError,
    OverloadedError,
    RequestTimeoutError,
    UnavailableError,
)
from expertd_server.event_loop import EventLoop
from expertd_server.promise import Promise
from expertd_server.region_handover import RegionGiver, is_let_go, where_of
from expertd_server.remote_codec import RemoteAnswer, RemoteCall
from expertd_server.remote_layer import RemoteLayer
from expertd_server.ring import Arena, Block, Channel, Descriptor
from expertd_server.status import RelayedError

__all__ = ["ANSWERED", "CANCEL", "FAILED", "NUM_HELLO_FILES", "SUBMIT"]
__all__ += ["Applied", "EngineState", "Hello", "RemoteEngine"]

log = logging.getLogger(__name__)

# Kinds of descriptors: to the engine, and from it. Of FAILED, nbytes is the size of the serialised google.rpc.Status.
SUBMIT: Final = 1
CANCEL: Final = 2
ANSWERED: Final = 3
FAILED: Final = 4

# The thread looks up this often whether they shall end; nothing else depends on it.
_LOOK_UP_S: Final = 1.0
# How long a request waits for room in the arena, unless its deadline is nearer, and what its caller is told then.
_ROOM_TIMEOUT_S: Final = 1.0
_ROOM_RETRY_DELAY_S: Final = 0.1
# While calls wait for room, it is looked for at least this often.
_ROOM_LOOK_UP_S: Final = 0.005
# A lone request's answer is looked for so long before its coming has to wake anybody, which takes as long as Python
# does for it, where there are cores to spare for that: whoever looks has one to itself.
_LOOK_S: Final = 0.0005
_LEAST_CORES_TO_LOOK: Final = 8
# A request counts as lone when it and so many before it found no other in flight. Under load one in two or three is
# alone by chance: to look for its answer then takes time from others.
_LEAST_ALONE: Final = 16
# Requests that are sent before the engine is woken for them.
_MOST_UNTOLD: Final = 4
# What callers are told while there is no engine.
_ENGINE_RETRY_DELAY_S: Final = 1.0

_NO_MEMORY: Final = (None, None)
NUM_HELLO_FILES: Final = 5


@dataclass(frozen=True)
class Hello:
    """From a front-end that looks for an engine, into the mailbox, together with NUM_HELLO_FILES: those of its channel,
    and the engine's ends of a control connection and of the socket that regions go over."""

    name: str
    arena_bytes: int
    max_requests: int


@dataclass(frozen=True)
class EngineState:
    """From the engine: what it holds. The newest replaces all before."""

    sequence: int
    layers: tuple[RemoteLayer, ...]
    is_loading: bool
    is_draining: bool
    backend: str
    device: str


@dataclass(frozen=True)
class Applied:
    """From a front-end: from now on requests are checked against this state, or a later one."""

    sequence: int


class RemoteEngine:
    """Submits calls to the engine's process while there is one; looks for the next one when it has ended.

    name: of this process. mailbox: where an engine finds what front-ends send to whichever engine comes.
    on_state: called with what a new state holds, and with None when the engine is gone; in one thread.
    loop: where answers are read, so that who waits for them there is not woken from another thread; None: a thread's.
    """

    def __init__(
        self,
        name: str,
        mailbox: socket.socket,
        *,
        arena_bytes: int,
        max_requests: int,
        on_state: Callable[[EngineState | None], None],
        loop: EventLoop | None = None,
    ) -> None:
        self._loop = loop
        self._name = name
        self._mailbox = mailbox
        self._arena_bytes = arena_bytes
        self._max_requests = max_requests
        self._on_state = on_state
        self.regions = RegionGiver()
        """Memory that callers share with this process."""
        self._link: _Link | None = None
        self._is_draining = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expertd-engine-link", daemon=True)

    @property
    def queue_tokens(self) -> int:
        """Tokens that waited in the engine when its last answer was written."""
        link = self._link
        return 0 if link is None else link.queue_tokens

    def start(self) -> None:
        """Look for an engine."""
        self.regions.start()
        self._thread.start()

    def submit(
        self,
        call: RemoteCall,
        deadline_s: float | None = None,
        on_done: Callable[[Promise[Any]], object] | None = None,
        is_last: bool = False,
    ) -> Promise[Any]:
        """Queue a call, as `Engine.submit` does; what the engine refuses fails the promise.

        Where the shared memory has no room the call waits for it, a second at most and not beyond the deadline; then
        the promise fails with OverloadedError or RequestTimeoutError. Raises OverloadedError when too much is in
        flight or the call is larger than the memory, UnavailableError when there is no engine or the server drains.
        """
        if self._is_draining:
            raise UnavailableError("the server is draining and takes no new requests; try another server")
        link = self._link
        if link is None:
            raise _no_engine()
        return link.submit(call, deadline_s, on_done, is_last)

    def announce(self) -> None:
        """Wake the engine for a lone request while that is read and checked."""
        link = self._link
        if link is not None:
            link.announce()

    def hurry(self) -> None:
        """Wake the engine now; else it is woken when the event loop has read what else has come."""
        link = self._link
        if link is not None:
            link.wake()
            link.look_soon()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those in flight; False when some are left after timeout_s."""
        self._is_draining = True
        link = self._link
        return link is None or link.wait_idle(timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """Leave the engine; calls in flight fail with UnavailableError. False when it has not ended after timeout_s."""
        self._is_draining = True
        self._closed.set()
        link = self._link
        if link is not None:
            link.hang_up()
        self._thread.join(timeout_s)
        self.regions.close()
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                link = self._connect()
            except OSError as error:
                log.error("cannot offer a channel to the engine: %s", error)
                self._closed.wait(_LOOK_UP_S)
                continue
            try:
                link.serve(self._enter, self._closed.is_set)
            except Exception:  # this thread must outlive whatever an engine says
                log.exception("the way to the engine broke; looking for it anew")
            was_taken_in, self._link = self._link is not None, None
            link.fail_all(_no_engine())
            if not self._closed.is_set():
                gone = "the engine's process is gone"
                log.warning(gone if was_taken_in else "the engine did not take this front-end in")
                self._on_state(None)
            link.settle(_no_engine(), self._closed.is_set)
            self.regions.part(link.to_regions)
            if self._closed.is_set():
                return
            if not was_taken_in:  # it may refuse the next time too
                self._closed.wait(_LOOK_UP_S)

    def _enter(self, link: _Link, state: EngineState) -> None:
        if self._link is not link:
            self.regions.meet(link.to_regions)
        self._link = link  # first: once health is told of the layers, requests to them must find the way
        self._on_state(state)

    def _connect(self) -> _Link:
        with contextlib.ExitStack() as undo:
            channel = Channel.make(self._arena_bytes, self._max_requests)
            undo.callback(channel.close)
            mine, theirs = socket.socketpair()
            undo.enter_context(mine)
            with theirs:
                giving, taking = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                undo.enter_context(giving)
                with taking:
                    hello = pickle.dumps(Hello(self._name, self._arena_bytes, self._max_requests))
                    files = [*channel.fds, theirs.fileno(), taking.fileno()]
                    socket.send_fds(self._mailbox, [hello], files)
            link = _Link(channel, Control(mine), giving, self._loop)
            undo.pop_all()
        return link


class _Asked(Promise[Any]):
    """A call on its way: it waits for room in the arena, or the engine has it."""

    __slots__ = (
        "block",
        "call",
        "deadline_s",
        "encode",
        "give_up_s",
        "hidden_states",
        "is_taken_back",
        "link",
        "memory",
        "nbytes",
        "number",
        "place",
    )

    def __init__(
        self,
        link: _Link,
        call: RemoteCall,
        deadline_s: float | None,
        on_done: Callable[[Promise[Any]], object] | None,
    ) -> None:
        super().__init__(on_done)
        self.link = link
        self.call: RemoteCall | None = call
        """None once it is in the block: the message that it is part of need not wait for the answer."""
        self.encode = call.encode
        self.deadline_s = deadline_s
        spec, hidden_states = call.layer.spec, call.request[1][1]
        self.hidden_states = where_of(hidden_states, link.to_regions)
        self.place = None if call.place is None else where_of(call.place, link.to_regions)
        self.memory = (
            None if self.hidden_states is None else hidden_states,
            None if self.place is None else call.place,
        )
        """What the engine reads and writes of callers' memory, both of which keep the regions until it is over."""
        self.nbytes = block_bytes(call.request, spec.hidden_size, spec.top_k, self.hidden_states, self.place)
        self.number = 0
        """0: the engine was not asked yet."""
        self.block: Block | None = None
        """None: there was no room yet, or it is over."""
        self.give_up_s = math.inf
        """When to wait for room no more."""
        self.is_taken_back = False
        """Whether the engine was told that nobody waits any more."""

    def cancel(self) -> bool:
        """See `Promise.cancel`."""
        is_cancelled = super().cancel()
        if is_cancelled:
            self.link.take_back(self)
        return is_cancelled


class _Link:
    """The way to one engine process, for as long as that lives. to_regions: see `RegionGiver`; the socket is not this
    one's to close. loop: see `RemoteEngine`."""

    def __init__(self, channel: Channel, control: Control, to_regions: socket.socket, loop: EventLoop | None) -> None:
        self._max_requests = channel.max_requests
        self._to_engine, self._from_engine, memory = channel.open()
        self._arena = Arena(memory)
        self._control = control
        self.to_regions = to_regions
        self._loop = loop
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._waiting: dict[int, _Asked] = {}
        self._roomless: deque[_Asked] = deque()  # with _waiting no more than max_requests
        self._placing = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._num_untold = 0
        self._may_look = loop is not None and len(os.sched_getaffinity(0)) >= _LEAST_CORES_TO_LOOK
        self._num_alone = 0
        """Requests in a row that found no other in flight."""
        self._look_until_s = 0.0
        """When to look for an answer no more, and to be woken for it; 0: nobody looks."""
        self._is_completing = False
        self._is_over = False
        self._unsettled: list[_Asked] = []
        """Not answered when it was over, and in memory that the engine may still write to."""
        self._sequence = 0
        self.queue_tokens = 0

    def submit(
        self,
        call: RemoteCall,
        deadline_s: float | None,
        on_done: Callable[[Promise[Any]], object] | None,
        is_last: bool,
    ) -> Promise[Any]:
        self._check_open()
        asked = _Asked(self, call, deadline_s, on_done)
        # Nobody with a smaller wish passes by those who wait.
        block = None if self._roomless else self._arena.allocate(asked.nbytes)
        if block is not None:
            self._send(asked, block)
            if not is_last:  # else `hurry` wakes it
                self._wake_soon()
            return asked
        if asked.nbytes > self._arena.nbytes:
            raise self._no_room(asked.nbytes)
        asked.give_up_s = time.monotonic() + _ROOM_TIMEOUT_S
        with self._lock:
            self._check_open()
            self._roomless.append(asked)
            os.eventfd_write(self._wake_fd, 1)
        return asked

    def _send(self, asked: _Asked, block: Block) -> None:
        call, asked.call = asked.call, None
        assert call is not None, "it is sent once"
        layer_id = call.layer.layer_id
        if not write_call(block.view, call.request, layer_id, asked.deadline_s, asked.hidden_states, asked.place):
            raise InvalidArgumentError.of(
                "routing_logits.slice", "holds NaN, expected numbers, which stay as they are until the answer comes"
            )
        with self._lock:
            self._check_open()
            self._num_alone = 0 if self._waiting else self._num_alone + 1
            asked.block = block
            asked.number = number = next(self._numbers)
            self._waiting[number] = asked
            self._to_engine.put(SUBMIT, number, block.offset, block.nbytes)
        self._num_untold += 1

    def _wake_soon(self) -> None:
        """Once for what comes in one turn of the loop, but the engine shall not idle while much is being packed."""
        if self._loop is None or not self._loop.is_here or self._num_untold >= _MOST_UNTOLD:
            self.wake()
        elif self._num_untold == 1:
            self._loop.soon(self.wake)

    def wake(self) -> None:
        """Have the engine take what was sent."""
        self._num_untold = 0
        self._to_engine.wake()

    def announce(self) -> None:
        """See `RemoteEngine.announce`."""
        if self._may_look and self._num_alone >= _LEAST_ALONE:
            self._to_engine.announce()

    def look_soon(self) -> None:
        """Look for the answer to a lone request whenever the loop has nothing else to do, for a while."""
        is_lone = self._num_alone >= _LEAST_ALONE and len(self._waiting) == 1
        if self._may_look and is_lone and not self._look_until_s:
            assert self._loop is not None
            self._look_until_s = time.monotonic() + _LOOK_S
            self._loop.soon(self._look)

    def _look(self) -> None:
        assert self._loop is not None
        if not self._may_look:  # the engine is gone, and another thread takes what it has answered
            return
        self._complete_all(self._from_engine.look())
        if len(self._waiting) == 1 and time.monotonic() < self._look_until_s:
            self._loop.soon(self._look)
        else:
            self._look_until_s = 0.0
            self._take()

    def _place(self) -> None:
        """Send what waits for room, as far as there is some, and refuse what has waited too long."""
        if not self._roomless or not self._placing.acquire(blocking=False):
            return
        try:
            while self._roomless:
                one = self._roomless[0]
                now_s = time.monotonic()
                is_late = one.deadline_s is not None and one.deadline_s <= now_s
                block = None if is_late or one.done() else self._arena.allocate(one.nbytes)
                if block is None and not is_late and not one.done() and now_s < one.give_up_s:
                    return
                self._roomless.popleft()
                if block is not None:
                    try:
                        self._send(one, block)
                        self._wake_soon()
                    except ExpertdServerError as error:
                        _fail(one, error)
                    if one.cancelled():  # perhaps before it had a number
                        self.take_back(one)
                elif is_late:
                    _fail(one, RequestTimeoutError("the deadline passed before there was room for the request"))
                else:
                    _fail(one, self._no_room(one.nbytes))
        finally:
            self._placing.release()

    def wait_idle(self, timeout_s: float) -> bool:
        with self._idle:
            return self._idle.wait_for(lambda: not (self._waiting or self._roomless or self._is_completing), timeout_s)

    def hang_up(self) -> None:
        self._control.hang_up()

    def serve(self, on_state: Callable[[_Link, EngineState], None], is_closed: Callable[[], bool]) -> None:
        """Hand out what comes from the engine until it is gone."""
        poll = select.poll()
        poll.register(self._control.fileno(), select.POLLIN)
        poll.register(self._wake_fd, select.POLLIN)
        fd = self._from_engine.eventfd
        if self._loop is None:
            poll.register(fd, select.POLLIN)
        else:
            self._loop.soon(partial(self._loop.loop.add_reader, fd, self._take))
        try:
            self._listen(poll, on_state, is_closed)
        finally:
            if self._loop is not None:
                self._may_look = False
                self._hear_no_more(fd, self._loop)
        self._take()  # what the engine had answered before its end

    @staticmethod
    def _hear_no_more(fd: int, loop: EventLoop) -> None:
        is_done = threading.Event()

        def leave() -> None:
            loop.loop.remove_reader(fd)
            is_done.set()

        with contextlib.suppress(RuntimeError):  # the loop is closed, and hears nothing any more
            loop.soon(leave)
            is_done.wait(_LOOK_UP_S)

    def _listen(
        self, poll: select.poll, on_state: Callable[[_Link, EngineState], None], is_closed: Callable[[], bool]
    ) -> None:
        while not is_closed():
            ready = {fd for fd, _ in poll.poll((_ROOM_LOOK_UP_S if self._roomless else _LOOK_UP_S) * 1000)}
            if self._from_engine.eventfd in ready:
                self._take()
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            if self._control.fileno() in ready:
                try:
                    self._told(self._control.receive(), on_state)
                except EOFError:
                    return
            self._place()

    def _take(self) -> None:
        self._complete_all(self._from_engine.take())
        self._place()

    def _complete_all(self, descriptors: list[Descriptor]) -> None:
        if descriptors:
            with self._lock:
                answered = [self._waiting.pop(number) for _, number, _, _ in descriptors]
                self._is_completing = True  # who waits for the last answer waits until its caller has it
            for asked, (kind, _, _, nbytes) in zip(answered, descriptors, strict=True):
                try:
                    self._complete(asked, kind, nbytes)
                except Exception as error:  # one answer's nonsense is not the others'
                    log.exception("cannot make sense of an answer of the engine")
                    _fail(asked, error)
            with self._lock:
                self._is_completing = False
                if not self._waiting:
                    self._idle.notify_all()

    def fail_all(self, error: ExpertdServerError) -> None:
        """The end of it: what was not answered fails, but see `settle`, which must follow."""
        with self._lock:
            self._is_over = True
            asked, roomless = list(self._waiting.values()), list(self._roomless)
            self._waiting = {}
            self._roomless.clear()
            self._is_completing = True
        self._unsettled = [one for one in asked if any(one.memory)]
        for one in [*(one for one in asked if not any(one.memory)), *roomless]:
            _fail(one, error)
        with self._lock:
            self._is_completing = False
            self._idle.notify_all()
        self._to_engine.close()
        self._from_engine.close()
        self._control.close()
        os.close(self._wake_fd)

    def settle(self, error: ExpertdServerError, is_closed: Callable[[], bool]) -> None:
        """Fail the rest, when the engine cannot write to memory of theirs any more; or when this process ends."""
        while self._unsettled and not is_closed() and not is_let_go(self.to_regions, _LOOK_UP_S):
            pass
        while self._unsettled:
            _fail(self._unsettled.pop(), error)

    def _check_open(self) -> None:
        if self._is_over:
            raise _no_engine()
        num_requests = len(self._waiting) + len(self._roomless)
        if num_requests >= self._max_requests:
            raise OverloadedError(
                f"{num_requests} requests of this front-end are in flight, at most {self._max_requests} may "
                f"be (max_queue_requests); come back in {_ROOM_RETRY_DELAY_S} s",
                _ROOM_RETRY_DELAY_S,
            )

    def _no_room(self, nbytes: int) -> OverloadedError:
        return OverloadedError(
            f"requests in flight leave no room for one of {nbytes} bytes in the {self._arena.nbytes} bytes of "
            f"memory that this front-end shares with the engine (frontend_arena_bytes); come back in "
            f"{_ROOM_RETRY_DELAY_S} s",
            _ROOM_RETRY_DELAY_S,
        )

    def take_back(self, asked: _Asked) -> None:
        """Tell the engine, once, that nobody waits for this answer any more."""
        with self._lock:
            # The block stays the engine's until it answers: it may be reading it.
            if asked.number in self._waiting and not asked.is_taken_back and not self._is_over:
                asked.is_taken_back = True
                self._to_engine.publish(CANCEL, asked.number)

    def _complete(self, asked: _Asked, kind: int, nbytes: int) -> None:
        block, asked.block = asked.block, None
        (_, place), asked.memory = asked.memory, _NO_MEMORY
        assert block is not None, "else the engine was not asked"
        if kind == FAILED:
            _fail(asked, RelayedError(status_pb2.Status.FromString(read_error(block.view, nbytes))))
            return
        answer = RemoteAnswer(block, place)
        self.queue_tokens = answer.queue_tokens
        if not asked.set_running_or_notify_cancel():
            return
        if asked.encode is None:
            asked.set_result(answer)
            return
        try:
            encoded = asked.encode(answer)
        except Exception as error:
            asked.set_exception(error)
        else:
            asked.set_result(encoded)
        finally:
            del asked  # the error knows this frame: leave no cycle

    def _told(self, state: EngineState, on_state: Callable[[_Link, EngineState], None]) -> None:
        if state.sequence < self._sequence:  # two threads of the engine's process sent them
            return
        self._sequence = state.sequence
        on_state(self, state)
        self._control.send(Applied(state.sequence))


def _fail(promise: Promise[Any], error: Exception) -> None:
    if promise.set_running_or_notify_cancel():
        promise.set_exception(error)


def _no_engine() -> UnavailableError:
    return UnavailableError(
        f"the process that computes is starting, or ended and is being started again; come back in "
        f"{_ENGINE_RETRY_DELAY_S} s or try another server",
        _ENGINE_RETRY_DELAY_S,
    )
