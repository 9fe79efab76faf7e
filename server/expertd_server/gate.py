"""The engine's end of the way from the front-ends: takes their calls to the engine, and the answers back."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from expertd_server.bell import Bell
from expertd_server.blocks import MAX_ERROR_BYTES, answer_place, read_call, write_error
from expertd_server.bundle import BlockPlace, BundledCalls, bundles_of
from expertd_server.control import Control
from expertd_server.engine import Engine, ForwardResult
from expertd_server.errors import BackendError, ExpertdServerError, RequestTimeoutError, UnavailableError
from expertd_server.layer import MoELayer
from expertd_server.layout import BatchKind
from expertd_server.pinning import Share
from expertd_server.promise import Promise
from expertd_server.region_handover import RegionTaker
from expertd_server.remote import ANSWERED, CANCEL, FAILED, NUM_HELLO_FILES, SUBMIT, Applied, EngineState, Hello
from expertd_server.remote_layer import RemoteLayer
from expertd_server.result_blocks import write_result
from expertd_server.ring import Channel
from expertd_server.status import status_of
from expertd_server.store import LayerStore
from expertd_server.threads import ended
from expertd_server.wire import TORCH_DTYPES, call_of

if TYPE_CHECKING:
    from expertd_server._blocks import Bundle

__all__ = ["EngineGate"]

log = logging.getLogger(__name__)

_MAX_HELLO_BYTES: Final = 4096
_STALE_RETRY_DELAY_S: Final = 0.01
# Longer than a front-end takes to read, check and send a request.
_ANNOUNCED_S: Final = 0.0002


class EngineGate:
    """Serves every front-end that says hello. One thread reads all that they send; it waits for none of them, but for a
    moment, while nothing else is to be done, for a request that one has announced.

    store: what to serve, see `publish`. mailbox: see `RemoteEngine`. backend, device: as GetServerInfo tells them.
    share: see `Channel.open`. max_bundle_tokens: see `Engine.max_bundle_tokens`.
    """

    def __init__(
        self,
        engine: Engine,
        store: LayerStore[MoELayer],
        mailbox: socket.socket,
        *,
        backend: str,
        device: str,
        share: Share = memoryview,
        max_bundle_tokens: int = 0,
    ) -> None:
        self._share = share
        self._max_bundle_tokens = max_bundle_tokens
        self.engine = engine
        self._store = store
        self._mailbox = mailbox
        # No other engine process of this machine gives out the same: the clock goes on while it is up.
        self._layer_ids = itertools.count(time.monotonic_ns())
        self._layers: dict[int, MoELayer] = {}
        self._state = EngineState(0, (), is_loading=True, is_draining=False, backend=backend, device=device)
        self._changed = threading.Condition()
        self._peers: dict[int, _Peer] = {}
        """By each of the two files of theirs that are read."""
        self._epoll = select.epoll()
        self._epoll.register(mailbox, select.EPOLLIN)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._waking = threading.Lock()  # or its number might be another file's by then
        self._is_draining = False
        self._is_closed = False
        self._due: deque[Callable[[], object]] = deque()
        self._bells: dict[int, Bell] = {}
        """By their files."""
        self._waiting: dict[tuple[int, int, bool, int], _AskedTogether] = {}
        """What others of the same kind may join, by `Bundle.kind`."""
        self._to_wake: set[_Peer] = set()
        """The thread's own: who is to read answers."""
        self._thread = threading.Thread(target=self._run, name="expertd-gate", daemon=True)

    def start(self) -> None:
        """Take front-ends in."""
        self._thread.start()

    def publish(self, timeout_s: float = 0.0) -> bool:
        """Tell every front-end what the store holds by now; calls for other versions are refused from now on.

        Returns whether all of them check new requests against this state, or a later one, within timeout_s.
        """
        with self._changed:
            ids = {layer: layer_id for layer_id, layer in self._layers.items()}
            layers: dict[int, MoELayer] = {}
            told = []
            for held in self._store.all_held():
                for layer in held.versions:
                    layer_id = ids.get(layer) or next(self._layer_ids)
                    layers[layer_id] = layer
                    told.append(RemoteLayer.of(layer, layer_id, is_current=layer is held.current))
            self._layers = layers
            state = replace(
                self._state,
                sequence=self._state.sequence + 1,
                layers=tuple(told),
                is_loading=self._store.is_loading,
                is_draining=self._is_draining,
            )
            self._state = state
            peers = set(self._peers.values())
        for peer in peers:
            peer.control.send(state)
        with self._changed:
            return self._changed.wait_for(
                lambda: all(peer.applied >= state.sequence for peer in self._peers.values()), timeout_s
            )

    def begin_drain(self) -> None:
        """Have every front-end, of now and later, say NOT_SERVING and refuse new requests."""
        self._is_draining = True
        self.publish()

    def close(self) -> None:
        """Leave every front-end."""
        self._is_closed = True
        os.eventfd_write(self._wake_fd, 1)
        if not ended(self._thread):
            return  # it has the files that are closed below
        for peer in set(self._peers.values()):
            self._drop(peer)
        self._epoll.close()
        with self._waking:
            os.close(self._wake_fd)
            self._wake_fd = -1

    def leave(self) -> None:
        """Hang up on every front-end, and take none in; from any thread, and waits for no other."""
        self._is_closed = True
        os.eventfd_write(self._wake_fd, 1)
        for peer in list(self._peers.values()):
            peer.control.hang_up()

    def soon(self, function: Callable[[], object]) -> None:
        """Call a function when what front-ends have sent by now is read; from any thread."""
        self._due.append(function)
        if threading.get_ident() != self._thread.ident:
            with self._waking:
                if self._wake_fd >= 0:
                    os.eventfd_write(self._wake_fd, 1)

    def told(self) -> None:
        """See `ServingThread`: wake front-ends whose answers are there."""
        while self._to_wake:
            self._to_wake.pop().to_frontend.wake()

    def wake(self, peer: _Peer) -> None:
        """Have a front-end read its answers: once for a batch, because to wake who sleeps takes longer than to answer;
        from any thread."""
        if threading.get_ident() == self._thread.ident:
            self._to_wake.add(peer)
        else:
            peer.to_frontend.wake()

    def bell(self, function: Callable[[], object]) -> Bell:
        """A bell that has the gate's thread call a function; from any thread."""
        bell = Bell(function, self._silence)
        self._bells[bell.fd] = bell
        self._epoll.register(bell.fd, select.EPOLLIN)
        return bell

    def _silence(self, bell: Bell) -> None:
        del self._bells[bell.fd]
        if not self._epoll.closed:
            self._epoll.unregister(bell.fd)
        bell.discard()

    def _run(self) -> None:
        while not self._is_closed:
            for _ in range(len(self._due)):  # what these ask for has to wait until others have been read
                self._due.popleft()()
            for fd, _ in self._epoll.poll(0.0 if self._due else None):
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                    continue
                if fd == self._mailbox.fileno():
                    self._welcome()
                    continue
                bell = self._bells.get(fd)
                if bell is not None:
                    bell.answer()
                    continue
                peer = self._peers.get(fd)
                if peer is None:  # it was dropped a moment ago, or the gate is closed
                    continue
                try:
                    self._read(peer, fd)
                except EOFError:
                    self._drop(peer)
                except Exception:  # this thread serves everybody: one front-end's nonsense must not end it
                    log.exception("cannot make sense of front-end %s", peer.name)
                    self._drop(peer)
            self.engine.hurry()  # nothing else has come by now

    def _welcome(self) -> None:
        try:
            data, fds, flags, _ = socket.recv_fds(
                self._mailbox, _MAX_HELLO_BYTES, NUM_HELLO_FILES, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            log.error("cannot take a front-end in: %s", error)
            return
        if not data:
            log.info("nobody is left to start front-ends")
            self._epoll.unregister(self._mailbox)
            return
        try:
            if flags & socket.MSG_CTRUNC or len(fds) != NUM_HELLO_FILES:
                raise OSError(f"{len(fds)} of its {NUM_HELLO_FILES} files came; is the limit of open files reached?")
            self._take_in(pickle.loads(data), fds)
        except Exception as error:  # the front-end sees its files closed, and asks again; the others go on
            log.error("cannot take a front-end in: %s", error)
            return
        finally:
            for fd in fds:
                os.close(fd)

    def _take_in(self, hello: Hello, fds: list[int]) -> None:
        """Takes those files out of fds that are somebody's by now."""
        with contextlib.ExitStack() as undo:
            given = undo.enter_context(socket.socket(fileno=fds[-1]))
            fds.pop()
            connected = undo.enter_context(socket.socket(fileno=fds[-1]))
            fds.pop()
            channel = Channel(hello.arena_bytes, hello.max_requests, *fds)
            regions = RegionTaker(hello.name, given, self._share)
            peer = _Peer(hello.name, channel, Control(connected), regions, self._share)
            fds.clear()
            undo.callback(peer.close)
            with self._changed:
                for fd in peer.read_fds:
                    self._epoll.register(fd, select.EPOLLIN)
                    undo.callback(self._epoll.unregister, fd)
                regions.start()
                threading.Thread(target=self._greet, args=(peer,), name="expertd-greeting", daemon=True).start()
                self._peers.update(dict.fromkeys(peer.read_fds, peer))
            undo.pop_all()

    def _greet(self, peer: _Peer) -> None:
        """Tell a front-end what is held; in a thread of its own: more than a socket takes waits for it to read."""
        with self._changed:  # by now it is told of all that comes later
            state = self._state
        if peer.control.send(state):
            log.info("%s is connected", peer.name)

    def _read(self, peer: _Peer, fd: int) -> None:
        if fd == peer.from_frontend.eventfd:
            descriptors = peer.from_frontend.take()
            if not descriptors and self.engine.is_idle:  # it was announced
                descriptors = peer.from_frontend.take_within(_ANNOUNCED_S)
            if self._max_bundle_tokens:
                bundles, descriptors = bundles_of(
                    descriptors,
                    SUBMIT,
                    peer,
                    peer.to_frontend,
                    peer.memory,
                    peer.regions.views,
                    self._max_bundle_tokens,
                    self.engine.clock(),
                )
                for bundle in bundles:
                    self._submit_together(peer, bundle)
            for kind, number, offset, nbytes in descriptors:
                if kind == CANCEL:
                    peer.cancel(number)
                else:
                    self.submit(peer, number, offset, nbytes)
            return
        if not peer.control.wait(0):  # the event was of an earlier file of this number
            return
        applied: Applied = peer.control.receive()
        with self._changed:
            peer.applied = applied.sequence
            self._changed.notify_all()

    def submit(self, peer: _Peer, number: int, offset: int, nbytes: int) -> None:
        """Have the engine compute what lies in a block of a front-end's."""
        asked = _Asked(self.engine, peer, number, peer.memory[offset : offset + nbytes])
        try:
            layer_id, deadline_s, request, asked.place = read_call(asked.block, asked.peer.regions.views)
            layer = self._layers.get(layer_id)
            if layer is None:
                raise UnavailableError(
                    "the layers held here changed while this request came; ask again", _STALE_RETRY_DELAY_S
                )
            call = call_of(layer, request)
            call.encode = asked.answer
            call.place = answer_place(asked.block) if asked.place is None else asked.place
            promise = self.engine.submit(call, deadline_s)
        except Exception as error:
            asked.fail(error)
            return
        asked.peer.promises[asked.number] = promise
        promise.add_done_callback(asked.over)

    def _submit_together(self, peer: _Peer, bundle: Bundle) -> None:
        """Have the engine compute what a bundle of a front-end's asks, together with others where some wait."""
        kind = layer_id, hidden_dtype, is_routed, output_dtype = bundle.kind
        layer = self._layers.get(layer_id)
        if layer is None:
            self.submit_each(bundle)
            return
        waiting = self._waiting.get(kind)
        if waiting is not None:
            waiting.take_in(peer, bundle)
            if not bundle.num_requests:
                return
        batch_kind = BatchKind(TORCH_DTYPES[hidden_dtype], is_routed, TORCH_DTYPES[output_dtype])
        call = BundledCalls(layer, bundle, batch_kind, _fail_late, self._queue_tokens)
        asked = _AskedTogether(self, bundle)
        try:
            asked.promise = self.engine.submit(call)
        except ExpertdServerError:  # there may be room for some, and the others are told that there is none
            self.submit_each(bundle)
            return
        peer.together.add(asked)
        self._waiting[kind] = asked
        asked.promise.add_done_callback(asked.over)

    def submit_each(self, bundle: Bundle) -> None:
        """Have the engine compute a bundle's members one by one, so that each has its own luck."""
        for peer, *place in bundle.places():
            self.submit(peer, *place)

    def forget(self, asked: _AskedTogether) -> None:
        """It is over; from any thread."""
        kind = asked.bundle.kind
        if self._waiting.get(kind) is asked:
            self._waiting.pop(kind, None)

    def _queue_tokens(self) -> int:
        return self.engine.queue_tokens

    def _drop(self, peer: _Peer) -> None:
        """Forget a front-end. What it asked for and runs already is finished, in its memory, for nobody."""
        with self._changed:
            for fd in peer.read_fds:
                self._epoll.unregister(fd)
                del self._peers[fd]
            self._changed.notify_all()
        peer.close()
        if not self._is_closed:
            log.warning("%s is gone, %d requests of its own with it", peer.name, peer.num_requests)
        for asked in list(peer.together):
            asked.cancel(peer)
        for promise in list(peer.promises.values()):
            promise.cancel()


class _Asked:
    """A request of a front-end. Exactly one answer goes to it, whatever happens."""

    __slots__ = ("block", "engine", "number", "peer", "place")

    def __init__(self, engine: Engine, peer: _Peer, number: int, block: memoryview) -> None:
        self.engine = engine
        self.peer = peer
        self.number = number
        self.block = block
        self.place: memoryview | None = None
        """Where its output goes instead."""

    def answer(self, result: ForwardResult) -> None:
        """Write it, where the batch was computed; see `ForwardCall.encode`."""
        if not self.peer.is_gone:
            write_result(self.block, result, self.engine.queue_tokens, self.place)

    def over(self, promise: Promise[Any]) -> None:
        """The promise is kept, and so the answer is written, or it is given up; in any thread."""
        self.peer.promises.pop(self.number, None)
        self.peer.let_go()
        # NOTE: nothing is raised here: the error would know this frame, which knows its promise, which knows the error.
        failure = CancelledError() if promise.cancelled() else promise.exception()
        if failure is not None:
            self.fail(failure)
        else:
            self.peer.to_frontend.publish(ANSWERED, self.number)  # without effect where the front-end is gone

    def fail(self, error: BaseException) -> None:
        """Answer with an error."""
        self.peer.fail(self.number, self.block, error)


class _AskedTogether:
    """Requests of front-ends that the engine has as one call. Exactly one answer goes to each, whatever happens."""

    __slots__ = ("bundle", "gate", "promise")

    promise: Promise[Any]
    """Of the engine's call."""

    def __init__(self, gate: EngineGate, bundle: Bundle) -> None:
        self.gate = gate
        self.bundle = bundle

    def take_in(self, peer: _Peer, bundle: Bundle) -> None:
        """Have as many of a bundle's requests as there is room for, which the bundle loses."""
        if self.gate.engine.join(self.promise, bundle):
            peer.together.add(self)

    def cancel(self, peer: _Peer, number: int | None = None) -> bool:
        """Give up one of a front-end's requests, or all that are its own, unless they run; whether there are any."""
        num_tokens = self.bundle.num_tokens
        places = self.bundle.cancel(peer, number)
        if not places:
            return False
        self.gate.engine.left(self.promise, num_tokens - self.bundle.num_tokens, len(places))
        _fail_at(places, CancelledError())
        if not self.bundle.num_requests:
            self.promise.cancel()
        return True

    def over(self, promise: Promise[Any]) -> None:
        """The promise is kept, and so the answers are written, or it is given up; in any thread."""
        bundle, gate = self.bundle, self.gate
        gate.forget(self)
        peers: list[_Peer] = bundle.sources()
        for peer in peers:
            peer.together.discard(self)
        failure = CancelledError() if promise.cancelled() else promise.exception()  # see _Asked.over
        if failure is None:
            bundle.tell(ANSWERED)
            for peer in peers:
                gate.wake(peer)
        elif isinstance(failure, BackendError) and not bundle.is_spent and bundle.num_requests > 1:
            gate.submit_each(bundle)  # one of them may be to blame
        else:
            _fail_at(bundle.places(), failure)
        for peer in peers:
            peer.let_go()


def _fail_late(place: BlockPlace, waited_s: float) -> None:
    """Answer one whose deadline had passed when its batch started."""
    _fail_at([place], RequestTimeoutError.before_computing(waited_s))


def _fail_at(places: Sequence[BlockPlace], error: BaseException) -> None:
    """Answer requests with an error, each in its block."""
    for peer, number, offset, nbytes in places:
        peer.fail(number, peer.memory[offset : offset + nbytes], error)


class _Peer:
    """A front-end process."""

    def __init__(self, name: str, channel: Channel, control: Control, regions: RegionTaker, share: Share) -> None:
        self.name = name
        self.regions = regions
        self.from_frontend, self.to_frontend, self.memory = channel.open(share)
        self.control = control
        self.read_fds = (self.from_frontend.eventfd, control.fileno())
        self.promises: dict[int, Promise[Any]] = {}
        """Of requests that are not answered, by number; of those that the engine has one by one."""
        self.together: set[_AskedTogether] = set()
        """What others of them are part of."""
        self.applied = 0
        """Sequence of the newest state that it applies."""
        self.is_gone = False

    def cancel(self, number: int) -> None:
        """Give up a request of its own, unless that runs or is over."""
        promise = self.promises.get(number)
        if promise is not None:
            promise.cancel()
            return
        for asked in list(self.together):
            if asked.cancel(self, number):
                return

    @property
    def num_requests(self) -> int:
        """Of its own, that are not answered."""
        together = sum(peer is self for asked in list(self.together) for peer, *_ in asked.bundle.places())
        return len(self.promises) + together

    def fail(self, number: int, block: memoryview, error: BaseException) -> None:
        """Answer one with an error."""
        if self.is_gone:
            return
        status = status_of(error, self.name)
        data = status.SerializeToString()
        if len(data) > MAX_ERROR_BYTES:
            status.ClearField("details")
            data = status.SerializeToString()
        self.to_frontend.publish(FAILED, number, 0, write_error(block, data))

    def close(self) -> None:
        self.is_gone = True
        self.from_frontend.close()
        self.to_frontend.close()
        self.control.close()
        self.let_go()

    def let_go(self) -> None:
        """Leave its callers' memory to them, if it is gone and nothing that it has asked for runs."""
        if self.is_gone and not self.promises and not self.together:
            self.regions.close()
