"""Connections to a port of several processes, spread by how many streams each has."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest
from shared_port import skip_without_programs

from expertd_server import port_sharing
from expertd_server.port_sharing import PortShare, lots, make_port_file, wanted

NUM_PROCESSES = 3
PATIENCE_S = 10.0


class Listening:
    """In place of a process: it listens, and takes connections when it is asked to."""

    def __init__(self, fd: int, number: int, host: str, port: int) -> None:
        self.share = PortShare(fd, number, NUM_PROCESSES)
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.socket.setblocking(False)

        def bind() -> int:
            self.socket.bind((host, port))
            self.socket.listen(1000)
            return int(self.socket.getsockname()[1])

        self.port = self.share.listen(bind)
        assert self.socket.fileno() in self.share._listening
        self.share._listening = [self.socket.fileno()]  # the others' would be in other processes

    def take(self) -> int:
        """How many have come."""
        count = 0
        while True:
            try:
                self.socket.accept()[0].close()
            except BlockingIOError:
                return count
            count += 1


class Group:
    """All of them in one."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.fd = make_port_file(NUM_PROCESSES)
        self.all: list[Listening] = []
        for number in range(NUM_PROCESSES):
            self.all.append(Listening(self.fd, number, host, self.all[0].port if self.all else 0))

    def replace(self, number: int) -> None:
        """As when a process has died and was started again."""
        self.all[number].socket.close()
        self.all[number] = Listening(self.fd, number, self.host, self.all[number].port)

    def who_gets(self, count: int) -> list[int]:
        for _ in range(count):
            socket.create_connection((self.host, self.all[0].port), PATIENCE_S).close()
        return [one.take() for one in self.all]

    def close(self) -> None:
        for one in self.all:
            one.socket.close()
        os.close(self.fd)


@pytest.fixture(params=["127.0.0.1", "::1"])
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    try:
        group = Group(request.param)
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise
        pytest.skip(f"there is no {request.param} here")
    yield group
    group.close()


def test_who_has_fewer_streams_gets_what_comes(group: Group) -> None:
    skip_without_programs()
    for busy in range(NUM_PROCESSES):
        for number, one in enumerate(group.all):
            one.share.has(0 if number == busy else 9)
        assert group.who_gets(20) == [20 if number == busy else 0 for number in range(NUM_PROCESSES)]


def test_no_file_is_left(group: Group) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        group.replace(1)
        group.all[1].share.has(3)
    assert len(os.listdir("/proc/self/fd")) == before


def test_between_equals_lots_are_drawn(group: Group) -> None:
    for one in group.all:
        one.share.has(4)
    assert min(group.who_gets(300)) > 50


def test_one_that_was_started_again_is_counted_anew_and_nobody_is_mixed_up(group: Group) -> None:
    skip_without_programs()
    for one in group.all:
        one.share.has(9)
    group.replace(0)
    group.all[2].share.has(9)
    assert group.who_gets(20) == [20, 0, 0]
    group.replace(2)
    group.all[0].share.has(9)
    assert group.who_gets(20) == [0, 0, 20]
    group.replace(1)
    group.all[2].share.has(9)
    assert group.who_gets(20) == [0, 20, 0]


def test_where_the_kernel_does_not_have_it_lots_are_drawn(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, program: bytes) -> None:
        raise OSError(errno.ENOPROTOOPT, "no such option")

    monkeypatch.setattr(port_sharing, "_attach", refuse)
    for number, one in enumerate(group.all):
        one.share.has(9 * number)
    assert sum(group.who_gets(20)) == 20


def test_nothing_is_done_to_files_once_it_is_closed(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    share = group.all[0].share
    share.close()
    monkeypatch.setattr(port_sharing, "_attach", lambda fd, program: pytest.fail("it may be another's file by now"))
    share.has(3)


def test_what_is_wanted_evens_out() -> None:
    assert wanted([0, 0, 0]) == [3, 3, 3]
    assert wanted([7, 7]) == [2, 2]
    assert wanted([1, 0]) == [1, 3]
    assert wanted([2, 0]) == [0, 4]
    assert wanted([5, 0, 1]) == [0, 9, 6]
    assert wanted([3]) == [1]


def test_a_program_has_two_instructions_for_each() -> None:
    assert len(lots([1])) == 3 * 8
    assert len(lots([1, 0, 5])) == 7 * 8
