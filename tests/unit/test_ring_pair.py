"""Where a caller may have its rings, and the server's ends of them."""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Iterator

import pytest

from expertd.v1 import expertd_pb2 as pb
from expertd.v1.message_ring import RingReader, RingWriter, ring_nbytes
from expertd_server import ring_pair
from expertd_server.errors import InvalidArgumentError
from expertd_server.ring_pair import RingPlace

SLOTS, SLOT_NBYTES = 4, 128
OFFSET = 64
NBYTES = OFFSET + 2 * ring_nbytes(SLOTS, SLOT_NBYTES)


def asked(nbytes: int = NBYTES, **fields: int) -> pb.RegisterRegion:
    rings = {"offset": OFFSET, "num_slots": SLOTS, "slot_nbytes": SLOT_NBYTES} | fields
    return pb.RegisterRegion(region=3, nbytes=nbytes, rings=pb.MessageRings(**rings))


def files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def memory() -> Iterator[memoryview]:
    mapped = mmap.mmap(-1, NBYTES)
    view = memoryview(mapped)
    yield view
    view.release()
    mapped.close()  # which fails while a ring has it


def test_none_are_asked_for() -> None:
    assert RingPlace.asked_for(pb.RegisterRegion(region=1, nbytes=NBYTES)) is None


def test_they_may_fill_the_region_to_its_last_byte() -> None:
    assert RingPlace.asked_for(asked()) == RingPlace(OFFSET, SLOTS, SLOT_NBYTES)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"nbytes": NBYTES - 1}, "rings"),
        ({"offset": OFFSET + 64}, "rings"),
        ({"offset": 2**64 - 64}, "rings"),
        ({"num_slots": 2**32 - 1, "slot_nbytes": 2**32 - 64}, "rings"),
        ({"offset": 0}, "rings.offset"),  # over the bytes that prove what is mapped
        ({"offset": 65}, "rings.offset"),
        ({"num_slots": 0}, "rings.num_slots"),
        ({"slot_nbytes": 0}, "rings.slot_nbytes"),
        ({"slot_nbytes": 96}, "rings.slot_nbytes"),
    ],
)
def test_places_that_cannot_be_are_told(fields: dict[str, int], wrong: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        RingPlace.asked_for(asked(**fields))
    assert [violation.field for violation in caught.value.violations] == [f"register_region.{wrong}"]


def test_both_directions_and_nothing_is_left(memory: memoryview) -> None:
    before = files()
    place = RingPlace.asked_for(asked())
    assert place is not None
    pair, (to_ring, bell) = place.open(memory)
    assert pair is not None
    middle = OFFSET + ring_nbytes(SLOTS, SLOT_NBYTES)
    requests = RingWriter(memory[OFFSET:middle], SLOTS, SLOT_NBYTES, to_ring)
    answers = RingReader(memory[middle:], SLOTS, SLOT_NBYTES, bell)
    assert pair.requests.may_sleep()
    assert requests.put(b"request")
    assert os.read(pair.requests.bell_fd, 9) == b"\0"
    assert pair.requests.take() == b"request"
    assert answers.may_sleep()
    assert pair.answers.put(b"answer")
    assert os.read(bell, 9) == b"\0"
    assert answers.take() == b"answer"
    assert not any(os.get_blocking(fd) for fd in (pair.requests.bell_fd, pair.answers.bell_fd))
    for end in (pair, requests, answers):
        end.close()
    assert files() == before


def test_a_machine_that_keeps_no_order_has_none(memory: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_pair, "IS_SUPPORTED", False)
    assert RingPlace(OFFSET, SLOTS, SLOT_NBYTES).open(memory) == (None, ())


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_where_no_files_are_left_there_are_no_rings_and_no_harm(
    memory: memoryview, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = files()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)  # the lowest number that is free, and so the next one
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + left, hard))
    try:
        assert RingPlace(OFFSET, SLOTS, SLOT_NBYTES).open(memory) == (None, ())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert files() == before
    assert "go over gRPC" in caplog.text
