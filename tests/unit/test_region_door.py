"""Memory that is handed in at a Unix socket: what is taken, what is refused, and what remains of either."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from expertd_server import region_door
from expertd_server.errors import ConfigError
from expertd_server.region_door import PROOF_BYTES, RegionDoor, RegionRefusedError

NBYTES = 64 * 1024
PATIENCE_S = 30.0
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def memfd(nbytes: int = NBYTES, seals: int = SEALS) -> int:
    fd = os.memfd_create("test-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def visit(door: RegionDoor, ticket: bytes, fds: list[int]) -> bytes:
    """What the door says; the files are closed."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.settimeout(PATIENCE_S)
            client.connect("\0" + door.address[1:] if door.address.startswith("@") else door.address)
            socket.send_fds(client, [ticket], fds)
            return client.recv(4096)
    finally:
        for fd in fds:
            os.close(fd)


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_too_many_at_a_time_are_turned_away_and_the_next_is_served(
    door: RegionDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(region_door, "_MAX_VISITORS", 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect("\0" + door.address[1:])
        try:
            said = visit(door, door.expect(NBYTES, Taken()), [memfd()])
        except OSError:  # it was closed before or after the ticket was written
            said = b""
        assert said == b""
    until_s = time.monotonic() + PATIENCE_S
    while not said and time.monotonic() < until_s:  # the door looks up when the silent one leaves
        try:
            said = visit(door, door.expect(NBYTES, Taken()), [memfd()])
        except OSError:
            continue
    assert said[:1] == b"\0"


@pytest.fixture
def door() -> Iterator[RegionDoor]:
    made = RegionDoor()
    yield made
    made.close()


class Taken:
    """Where the door puts memory."""

    def __init__(self) -> None:
        self.views: list[memoryview] = []

    def __call__(self, view: memoryview) -> tuple[int, ...]:
        self.views.append(view)
        return ()


def test_both_sides_see_the_same_memory(door: RegionDoor) -> None:
    taken = Taken()
    fd = memfd()
    with mmap.mmap(fd, NBYTES) as mine:
        mine[:PROOF_BYTES] = bytes(range(PROOF_BYTES))
        assert visit(door, door.expect(NBYTES, taken), [fd]) == b"\0" + bytes(range(PROOF_BYTES))
        (theirs,) = taken.views
        assert len(theirs) == NBYTES
        mine[100:103] = b"abc"
        assert theirs[100:103] == b"abc"
        theirs[200:203] = b"xyz"
        assert mine[200:203] == b"xyz"


def test_the_owner_cannot_take_pages_away(door: RegionDoor) -> None:
    taken = Taken()
    fd = memfd()
    with os.fdopen(os.dup(fd), "r+b", buffering=0) as mine:
        assert visit(door, door.expect(NBYTES, taken), [fd])[:1] == b"\0"
        with pytest.raises(PermissionError):
            os.truncate(mine.fileno(), 0)
        os.pwrite(mine.fileno(), b"still here", NBYTES - 10)
    assert bytes(taken.views[0][-10:]) == b"still here"


class TestRefused:
    """Nothing is taken, the reason is told, and the next one is served."""

    def refused(self, door: RegionDoor, fds: list[int], ticket: bytes | None = None) -> str:
        taken = Taken()
        said = visit(door, door.expect(NBYTES, taken) if ticket is None else ticket, fds)
        assert said[:1] == b"\1"
        assert not taken.views
        assert visit(door, door.expect(NBYTES, taken), [memfd()])[:1] == b"\0"
        return said[1:].decode()

    def test_memory_that_may_shrink(self, door: RegionDoor) -> None:
        assert "F_SEAL_SHRINK" in self.refused(door, [memfd(seals=0)])
        assert "F_SEAL_SHRINK" in self.refused(door, [memfd(seals=fcntl.F_SEAL_GROW)])

    def test_memory_that_cannot_be_written(self, door: RegionDoor) -> None:
        assert "writing" in self.refused(door, [memfd(seals=SEALS | fcntl.F_SEAL_WRITE)])

    def test_memory_that_is_too_small(self, door: RegionDoor) -> None:
        assert str(NBYTES - 1) in self.refused(door, [memfd(NBYTES - 1)])

    def test_huge_pages(self, door: RegionDoor) -> None:
        try:
            fd = os.memfd_create("test-huge", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
        except OSError as error:
            pytest.skip(f"this kernel makes no huge pages: {error}")
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        assert "MFD_HUGETLB" in self.refused(door, [fd])

    @pytest.mark.parametrize("kind", ["file", "pipe", "socket"])
    def test_what_is_no_memory(self, door: RegionDoor, kind: str) -> None:
        if kind == "file":
            with tempfile.TemporaryFile() as file:
                file.truncate(NBYTES)
                fds = [os.dup(file.fileno())]
        elif kind == "pipe":
            read, write = os.pipe()
            os.close(write)
            fds = [read]
        else:
            fds = [socket.socket().detach()]
        assert "memfd" in self.refused(door, fds)

    def test_no_file_and_two_files(self, door: RegionDoor) -> None:
        assert "expected 1" in self.refused(door, [])
        assert "expected 1" in self.refused(door, [memfd(), memfd()])

    def test_a_ticket_that_nobody_gave_out(self, door: RegionDoor) -> None:
        assert "ticket" in self.refused(door, [memfd()], ticket=bytes(16))
        assert "ticket" in self.refused(door, [memfd()], ticket=b"short")
        assert "ticket" in self.refused(door, [memfd()], ticket=bytes(1000))

    def test_a_ticket_is_good_once(self, door: RegionDoor) -> None:
        ticket = door.expect(NBYTES, Taken())
        assert visit(door, ticket, [memfd()])[:1] == b"\0"
        assert "ticket" in self.refused(door, [memfd()], ticket=ticket)

    def test_a_ticket_that_was_given_back(self, door: RegionDoor) -> None:
        ticket = door.expect(NBYTES, Taken())
        door.forget(ticket)
        assert "ticket" in self.refused(door, [memfd()], ticket=ticket)

    def test_an_old_ticket(self, door: RegionDoor, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(region_door, "_TICKET_S", -1.0)
        ticket = door.expect(NBYTES, Taken())
        monkeypatch.undo()
        assert "older" in self.refused(door, [memfd()], ticket=ticket)

    def test_what_the_stream_says_no_to(self, door: RegionDoor) -> None:
        def no(_: memoryview) -> None:
            raise RegionRefusedError("the stream has ended")

        said = visit(door, door.expect(NBYTES, no), [memfd()])
        assert said == b"\1the stream has ended"

    def test_another_user(self, door: RegionDoor, monkeypatch: pytest.MonkeyPatch) -> None:
        ticket = door.expect(NBYTES, Taken())
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
        assert b"--shared-memory-any-user" in visit(door, ticket, [memfd()])
        monkeypatch.undo()
        assert visit(door, ticket, [memfd()])[:1] == b"\0"


def test_another_user_where_any_may(monkeypatch: pytest.MonkeyPatch) -> None:
    door = RegionDoor(any_user=True)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    try:
        assert visit(door, door.expect(NBYTES, Taken()), [memfd()])[:1] == b"\0"
    finally:
        monkeypatch.undo()
        door.close()


def test_who_says_nothing_holds_nobody_up_and_is_sent_away(door: RegionDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_door, "_VISIT_S", 0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.settimeout(PATIENCE_S)
        silent.connect("\0" + door.address[1:])
        assert visit(door, door.expect(NBYTES, Taken()), [memfd()])[:1] == b"\0"
        assert silent.recv(100) == b""  # closed


def test_a_door_that_looks_up_while_it_is_being_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread sees the end before it is rung for it, and must not close the bell first."""
    monkeypatch.setattr(region_door, "_LOOK_UP_S", 0.02)
    ring = os.eventfd_write

    def ring_late(fd: int, value: int) -> None:
        door._thread.join(0.3)
        ring(fd, value)

    door = RegionDoor()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect("\0" + door.address[1:])
        assert visit(door, door.expect(NBYTES, Taken()), [memfd()])[:1] == b"\0"  # it has seen both
        monkeypatch.setattr(os, "eventfd_write", ring_late)
        door.close()
    assert not door._thread.is_alive()


def test_many_at_a_time_are_all_served(door: RegionDoor) -> None:
    said: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: said.append(visit(door, door.expect(NBYTES, Taken()), [memfd()])[:1]))
        for _ in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert said == [b"\0"] * 32


def test_what_was_taken_is_let_go_of_in_the_door_s_thread(door: RegionDoor) -> None:
    """To unmap it takes time, which the event loop does not have."""
    threads: list[str] = []
    over = threading.Event()

    def let_go(number: int) -> None:
        threads.append(threading.current_thread().name)
        if number == 3:
            over.set()

    for number in range(4):
        door.forget(door.expect(NBYTES, Taken()), partial(let_go, number))
    assert over.wait(PATIENCE_S)
    assert threads == ["expertd-region-door"] * 4
    door.close()
    door.forget(b"", partial(let_go, 4))
    assert len(threads) == 4


def test_nothing_is_left_of_what_was_taken_or_refused(door: RegionDoor) -> None:
    assert visit(door, bytes(16), [memfd()])[:1] == b"\1"
    before = count_fds()
    for number in range(40):
        taken = Taken()
        ticket = door.expect(NBYTES, taken) if number % 2 else bytes(16)
        visit(door, ticket, [memfd(seals=SEALS if number % 4 else 0)])
    del taken
    until_s = time.monotonic() + PATIENCE_S
    while count_fds() > before and time.monotonic() < until_s:  # the door closes its end after it has answered
        time.sleep(0.01)
    assert count_fds() <= before  # what others left to be closed may be so by now
    assert "test-region" not in Path("/proc/self/maps").read_text()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: that of a Unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


class TestDirectory:
    def test_a_socket_there_that_goes_with_the_door(self, folder: Path) -> None:
        door = RegionDoor(folder)
        (path,) = folder.iterdir()
        assert door.address == str(path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert visit(door, door.expect(NBYTES, Taken()), [memfd()])[:1] == b"\0"
        door.close()
        assert not list(folder.iterdir())

    def test_sockets_of_servers_that_were_killed_are_removed_and_no_others(self, folder: Path) -> None:
        alive = RegionDoor(folder)
        dead = folder / "expertd-regions-1-dead"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
            left.bind(str(dead))
        (folder / "somebody-elses").touch()
        door = RegionDoor(folder)
        assert not dead.exists()
        assert len(list(folder.iterdir())) == 3
        assert visit(alive, alive.expect(NBYTES, Taken()), [memfd()])[:1] == b"\0"
        door.close()
        alive.close()

    def test_a_directory_that_is_none(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="nowhere"):
            RegionDoor(folder / "nowhere")
