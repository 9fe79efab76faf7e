"""Shared memory that is pinned where it is used, and for how long."""

from __future__ import annotations

import gc
import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from fake_device import FakeDevice

from expertd_server import pinning
from expertd_server.pinning import Pinner

PATIENCE_S = 10.0
PIECE_BYTES = 1 << 16


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "PIECE_BYTES", PIECE_BYTES)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def pinner(device: FakeDevice) -> Iterator[Pinner]:
    pinner = device.pinner()
    yield pinner
    pinner.close()
    wait_for(lambda: not device.pinned)


def pinned_address(data: bytes | memoryview) -> int:
    return pinning.pinned_address(data, len(data))


def wait_for(condition: Callable[[], object]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s, "it never came to pass"
        time.sleep(0.001)


def wait_pinned(view: memoryview) -> None:
    wait_for(lambda: pinned_address(view))


def bounds(device: FakeDevice) -> list[tuple[int, int]]:
    return sorted(device.pinned.items())


def test_only_the_pieces_in_use_are_pinned_and_only_once(pinner: Pinner, device: FakeDevice) -> None:
    mapped = mmap.mmap(-1, 8 * PIECE_BYTES)
    view = pinner.share(mapped)
    address = pinning.address_of(view)
    at = -address % PIECE_BYTES  # where the first whole piece starts
    assert pinned_address(view[at + 10 : at + 20]) == 0, "nobody waits for it"
    wait_for(lambda: pinned_address(view[at + 10 : at + 20]) == address + at + 10)
    assert bounds(device) == [(address + at, PIECE_BYTES)]
    assert pinned_address(view[at : at + PIECE_BYTES]) == address + at
    across = view[at + PIECE_BYTES - 1 : at + 2 * PIECE_BYTES + 1]
    assert pinned_address(across) == 0
    wait_for(lambda: pinned_address(across) == address + at + PIECE_BYTES - 1)
    assert bounds(device) == [(address + at + n * PIECE_BYTES, PIECE_BYTES) for n in range(3)]
    assert pinner.pinned_bytes == 3 * PIECE_BYTES
    assert device.num_pinned == 3


def test_the_first_and_the_last_piece_end_where_the_memory_does(pinner: Pinner, device: FakeDevice) -> None:
    mapped = mmap.mmap(-1, 3 * PIECE_BYTES + 4096)
    view = pinner.share(mapped)
    wait_pinned(view)
    pinned, address = bounds(device), pinning.address_of(view)
    assert pinned[0][0] == address
    assert sum(nbytes for _, nbytes in pinned) == len(view) == pinner.pinned_bytes
    assert all(start % PIECE_BYTES == 0 for start, _ in pinned[1:])


def test_it_stays_pinned_and_mapped_as_long_as_there_is_a_view(pinner: Pinner, device: FakeDevice) -> None:
    mapped = mmap.mmap(-1, PIECE_BYTES)
    view = pinner.share(mapped)
    wait_pinned(view)
    piece = view[100:200][10:20]
    del view
    gc.collect()
    assert pinned_address(piece)
    assert not mapped.closed
    piece[0] = 7
    del piece
    wait_for(lambda: mapped.closed)
    assert not device.pinned
    assert pinner.pinned_bytes == 0


def test_who_lets_go_does_not_wait_for_it(pinner: Pinner, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    monkeypatch.setattr(
        pinner, "_unpin", lambda address: (threads.append(threading.current_thread()), device.pinned.pop(address))
    )
    mapped = mmap.mmap(-1, 4096)
    view = pinner.share(mapped)
    wait_pinned(view)
    del view
    wait_for(lambda: mapped.closed)
    assert [thread.name for thread in threads] == ["expertd-pinner"]


def test_what_is_let_go_before_it_is_pinned_leaves_nothing(pinner: Pinner, device: FakeDevice) -> None:
    for _ in range(100):
        mapped = mmap.mmap(-1, 4 * PIECE_BYTES)
        view = pinner.share(mapped)
        pinned_address(view)
        del view
        wait_for(lambda mapped=mapped: mapped.closed)  # type: ignore[misc]
    assert not device.pinned
    assert pinner.pinned_bytes == 0


def test_no_more_is_pinned_than_may_be_and_room_is_used_again(
    device: FakeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    pinner = device.pinner(2 * PIECE_BYTES)
    first = pinner.share(mmap.mmap(-1, 2 * PIECE_BYTES))
    wait_pinned(first)
    second = pinner.share(mmap.mmap(-1, PIECE_BYTES))
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            assert pinned_address(second) == 0
            time.sleep(0.001)
    assert [record.message for record in caplog.records] == [
        f"{len(first)} bytes are pinned (max_pinned_bytes): the processor copies the rest"
    ]
    assert pinner.pinned_bytes == len(first)
    del first
    wait_pinned(second)
    assert sum(device.pinned.values()) == PIECE_BYTES
    del second
    wait_for(lambda: not device.pinned)
    pinner.close()


def test_what_is_asked_for_at_once_is_no_more_than_may_be(device: FakeDevice) -> None:
    pinner = device.pinner(PIECE_BYTES)
    view = pinner.share(mmap.mmap(-1, 3 * PIECE_BYTES))
    assert pinned_address(view) == 0
    pinner.share(last := mmap.mmap(-1, PIECE_BYTES))  # nobody has it, and what was asked for comes first
    wait_for(lambda: last.closed)
    assert 0 < pinner.pinned_bytes <= PIECE_BYTES
    del view
    wait_for(lambda: not device.pinned)
    pinner.close()


def test_where_pinning_fails_it_is_said_once_and_nothing_is_pinned(
    device: FakeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    device.failure = RuntimeError("pinning shared memory failed: operation not permitted")
    pinner = device.pinner()
    mapped = mmap.mmap(-1, 4 * PIECE_BYTES)
    view = pinner.share(mapped)
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            assert pinned_address(view) == 0
            time.sleep(0.001)
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert "the processor copies: pinning shared memory failed" in lines[0]
    del view
    wait_for(lambda: mapped.closed)
    pinner.close()


def test_a_closed_pinner_pins_nothing_more_and_ends_when_the_last_memory_is_gone(device: FakeDevice) -> None:
    before = set(threading.enumerate())
    pinner = device.pinner()
    (thread,) = set(threading.enumerate()) - before
    mapped = mmap.mmap(-1, 2 * PIECE_BYTES)
    view = pinner.share(mapped)
    wait_pinned(view)
    pinner.close()
    other = pinner.share(mmap.mmap(-1, 4096))
    assert pinned_address(other) == 0
    assert pinned_address(view), "what is pinned stays so"
    del view, other
    wait_for(lambda: mapped.closed)
    assert not device.pinned
    wait_for(lambda: not thread.is_alive())


def test_other_memory_is_not_looked_after() -> None:
    assert pinned_address(b"bytes") == 0
    assert pinned_address(memoryview(bytearray(10))) == 0
