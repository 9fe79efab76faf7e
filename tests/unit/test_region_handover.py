"""Regions that one end of a socket hands to the other: mapped on both sides, forgotten on both, and no file is left."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expertd_server import region_handover
from expertd_server.region_door import RegionRefusedError
from expertd_server.region_handover import RegionGiver, RegionTaker, is_let_go, where_of

NBYTES = 64 * 1024
PATIENCE_S = 30.0


def memfd(nbytes: int = NBYTES, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("test-handover", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def mappings() -> int:
    return sum("memfd:test-handover" in line for line in Path("/proc/self/maps").read_text().splitlines())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def wait_for(condition: Callable[[], object]) -> None:
    """Wait for what no event tells."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.002)):
        if condition():
            return
        pause.wait(0.002)
    pytest.fail(f"not so within {PATIENCE_S} s")


class Ends:
    """A front-end's end, and the engines that it meets."""

    def __init__(self) -> None:
        self.giver = RegionGiver()
        self.takers: list[RegionTaker] = []
        self.ways: list[socket.socket] = []
        self.giver.start()

    def meet(self) -> RegionTaker:
        """An engine."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.takers.append(RegionTaker("frontend-0", theirs, memoryview))
        self.ways.append(mine)
        self.takers[-1].start()
        self.giver.meet(mine)
        return self.takers[-1]

    def map_one(self) -> memoryview:
        """Memory that a caller has handed in."""
        fd = memfd()
        try:
            return self.giver.map_file(fd, NBYTES)
        finally:
            os.close(fd)

    def map_taken(self) -> memoryview:
        """The same, when the last engine has it, too."""
        view = self.map_one()
        wait_for(lambda: where_of(view, self.ways[-1]))
        return view

    def close(self) -> None:
        for way in self.ways:
            self.giver.part(way)
        self.giver.close()
        for taker in self.takers:
            taker.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    gc.collect()
    before = open_files()
    made = Ends()
    yield made
    made.close()
    wait_for(lambda: open_files() <= before)
    wait_for(lambda: not mappings())


def test_both_ends_see_the_same_memory(ends: Ends) -> None:
    taker = ends.meet()
    mine = ends.map_taken()
    assert len(mine) == NBYTES
    where = where_of(mine[100:110], ends.ways[0])
    assert where is not None
    number, offset, nbytes = where
    assert (offset, nbytes) == (100, 10)
    theirs = taker.views[number]
    mine[100:110] = b"0123456789"
    assert theirs[100:110] == b"0123456789"
    theirs[:3] = b"abc"
    assert mine[:3] == b"abc"
    assert where_of(mine[50:][50:][:10], ends.ways[0]) == where, "a view of a view of it"


def test_other_bytes_are_nowhere(ends: Ends) -> None:
    ends.meet()
    view = ends.map_taken()
    for other in (b"bytes", memoryview(bytearray(10)), memoryview(mmap.mmap(-1, 4096)), view[:0]):
        assert where_of(other, ends.ways[0]) is None


def test_what_is_mapped_before_there_is_an_engine_goes_to_the_first(ends: Ends) -> None:
    view = ends.map_one()
    taker = ends.meet()
    wait_for(lambda: where_of(view, ends.ways[0]))
    assert len(taker.views) == 1


def test_what_lives_goes_to_the_next_engine_and_what_does_not_no_more(ends: Ends) -> None:
    first = ends.meet()
    stays, goes = ends.map_taken(), ends.map_taken()
    assert len(first.views) == 2
    first.close()
    wait_for(lambda: is_let_go(ends.ways[0], 0))
    ends.giver.part(ends.ways[0])
    del goes
    second = ends.meet()
    wait_for(lambda: where_of(stays, ends.ways[1]))
    assert where_of(stays, ends.ways[0]) is None
    (theirs,) = second.views.values()
    stays[:5] = b"stays"
    assert theirs[:5] == b"stays"
    wait_for(lambda: mappings() == 2)


def test_it_is_forgotten_when_the_last_view_is_gone(ends: Ends) -> None:
    taker = ends.meet()
    view = ends.map_taken()
    files = open_files()
    piece = view[10:20][2:4]
    del view
    gc.collect()
    piece[:] = b"ok"
    assert where_of(piece, ends.ways[0])
    assert len(taker.views) == 1
    assert mappings() == 2
    del piece
    wait_for(lambda: not taker.views)
    wait_for(lambda: not mappings())
    wait_for(lambda: open_files() < files)


def test_a_view_there_keeps_it_mapped_when_it_is_forgotten(ends: Ends) -> None:
    taker = ends.meet()
    view = ends.map_taken()
    (theirs,) = taker.views.values()
    del view
    wait_for(lambda: not taker.views)
    wait_for(lambda: mappings() == 1)
    theirs[-1] = 1
    del theirs
    wait_for(lambda: not mappings())


def test_many_come_and_go(ends: Ends) -> None:
    taker = ends.meet()
    views = [ends.map_one() for _ in range(200)]
    for at in range(0, 200, 2):
        views[at] = memoryview(b"")
    wait_for(lambda: all(where_of(view, ends.ways[0]) for view in views[1::2]))
    wait_for(lambda: len(taker.views) == 100)
    assert len({where_of(view, ends.ways[0]) for view in views[1::2]}) == 100, "each has a number of its own"
    views.clear()
    wait_for(lambda: not taker.views)


class TestTheEngineTakesItNot:
    """Then nobody names it, and others are taken all the same."""

    def refused(self, ends: Ends, caplog: pytest.LogCaptureFixture, why: str) -> memoryview:
        view = ends.map_one()
        wait_for(lambda: why in caplog.text)
        assert "frontend-0 copies from and to memory of a caller's" in caplog.text
        return view

    def test_which_has_too_many_files_open(
        self, ends: Ends, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taker = ends.meet()
        with monkeypatch.context() as patch:
            patch.setattr(resource, "getrlimit", lambda _: (6, 6))
            view = self.refused(ends, caplog, "half of the 6 files that this process may open are open")
        assert ends.map_taken()
        assert where_of(view, ends.ways[0]) is None
        assert len(taker.views) == 1

    def test_whose_files_have_no_bound(self, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
        ends.meet()
        monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
        assert ends.map_taken()

    def test_which_cannot_map_it(
        self, ends: Ends, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taker = ends.meet()
        map_memory = region_handover.map_memory

        def refuse(fd: int, nbytes: int, share: Callable[[mmap.mmap], memoryview]) -> memoryview:
            if share is memoryview:  # the engine's
                raise RegionRefusedError("no room")
            return map_memory(fd, nbytes, share)

        with monkeypatch.context() as patch:
            patch.setattr(region_handover, "map_memory", refuse)
            view = self.refused(ends, caplog, "no room")
        assert ends.map_taken()
        assert where_of(view, ends.ways[0]) is None
        assert len(taker.views) == 1

    def test_because_it_is_gone(self, ends: Ends) -> None:
        ends.meet().close()
        view = ends.map_one()
        ends.meet()
        wait_for(lambda: where_of(view, ends.ways[1]))

    def test_memory_that_may_shrink_is_refused_by_the_engine_too(
        self, ends: Ends, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Whatever a front-end hands on."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        taker = RegionTaker("frontend-0", theirs, memoryview)
        taker.start()
        with mine:
            fd = memfd(seals=0)
            socket.send_fds(mine, [region_handover._MESSAGE.pack(1, NBYTES)], [fd])
            os.close(fd)
            assert mine.recv(1) == b"\1"
            assert "F_SEAL_SHRINK" in caplog.text
            assert not taker.views


def test_what_cannot_be_mapped_is_refused_and_nothing_is_left(ends: Ends) -> None:
    for fd in (memfd(seals=0), memfd(NBYTES - 1)):
        with pytest.raises(RegionRefusedError):
            ends.giver.map_file(fd, NBYTES)
        os.close(fd)


def test_without_files_it_is_refused_and_nothing_is_left(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(region_handover.os, "dup", fail)
    with pytest.raises(RegionRefusedError, match="Too many open files"):
        ends.map_one()


def test_an_engine_that_says_nothing_keeps_nobody_waiting(ends: Ends) -> None:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ends.giver.meet(mine)
    with theirs:
        view = ends.map_one()
        assert len(theirs.recv(100)) == region_handover._MESSAGE.size, "it was asked"
        other = ends.map_one()
        view[:2] = other[:2] = b"ok"
        assert where_of(view, mine) is None
        ends.giver.part(mine)
    del view, other
    wait_for(lambda: not mappings())


def test_a_giver_that_is_closed_while_an_engine_says_nothing_ends(ends: Ends) -> None:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ends.giver.meet(mine)
    with theirs:
        view = ends.map_one()
        theirs.recv(100)
        ends.giver.part(mine)
        ends.giver.close()
        later = ends.map_one()
        assert where_of(view, mine) is None
        assert where_of(later, mine) is None
        del view, later
        wait_for(lambda: not ends.giver._thread.is_alive())
        wait_for(lambda: not mappings())


def test_the_other_end_is_told_when_an_engine_lets_go(ends: Ends) -> None:
    taker = ends.meet()
    view = ends.map_taken()
    assert not is_let_go(ends.ways[0], 0)
    taker.close()
    assert is_let_go(ends.ways[0], PATIENCE_S)
    wait_for(lambda: mappings() == 1)
    view[:2] = b"ok"


def test_when_the_front_end_is_gone_nothing_stays_mapped(ends: Ends) -> None:
    taker = ends.meet()
    view = ends.map_taken()
    (theirs,) = taker.views.values()
    ends.giver.part(ends.ways[0])  # which is what the end of its process does
    wait_for(lambda: not taker.views)
    theirs[:2] = b"ok"
    assert view[:2] == b"ok"
    del theirs
    wait_for(lambda: mappings() == 1)


def test_who_parts_when_all_is_closed_leaves_no_file_open() -> None:
    ends = Ends()
    ends.meet()
    ends.giver.close()
    ends.giver.part(ends.ways[0])
    assert ends.ways[0].fileno() == -1
    ends.takers[0].close()
