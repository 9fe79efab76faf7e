"""Large objects lie in the memory that was chosen for them, and an answer is made up there as it is elsewhere."""

from __future__ import annotations

import io
import itertools
import mmap
import random

import pytest
from alone import alone

from expertd_server import message_memory
from expertd_server.compiled import CODEC
from expertd_server.message_memory import answer_behind, make_answer, sharer_of
from expertd_server.native import address_of

pytestmark = pytest.mark.skipif(CODEC is None, reason="the compiled codec was not built")

PAGE, LEAST = 4096, 32 * 1024
NBYTES = 4 * 1024 * 1024
SEED = 20261128


def use(nbytes: int = NBYTES) -> memoryview:
    memory = memoryview(mmap.mmap(-1, nbytes))
    message_memory.use(memory)
    return memory


def used(nbytes: int = NBYTES) -> int:
    return nbytes - CODEC.free_message_bytes()


def lies_in(data: bytes | bytearray | memoryview, memory: memoryview) -> bool:
    start = address_of(memory)
    return start <= address_of(data) < start + len(memory)


def test_without_one_nothing_changes() -> None:
    data = memoryview(bytes(LEAST))
    assert sharer_of(data) is data.obj
    assert make_answer(True, 1, 2, 128, 2048) is None
    assert answer_behind(data) is None
    assert CODEC.free_message_bytes() == 0


@alone
def test_large_objects_lie_there_until_they_go() -> None:
    memory = use()
    small, large = bytes(LEAST // 2), bytes(bytearray(LEAST))
    assert not lies_in(small, memory)
    assert lies_in(large, memory)
    assert sharer_of(memoryview(large)[5:]) is memory.obj
    assert sharer_of(memoryview(small)) is small
    assert used() == LEAST + PAGE  # the object has a head
    first = address_of(large)
    del large
    assert used() == 0
    assert address_of(bytes(bytearray(LEAST))) == first


@alone
def test_there_is_one() -> None:
    use()
    with pytest.raises(RuntimeError, match="one memory"):
        use()


@alone
def test_what_has_no_room_lies_elsewhere() -> None:
    memory = use()
    held = [bytes([n]) * (1 << 20) for n in range(8)]
    assert [lies_in(each, memory) for each in held] == [True] * 3 + [False] * 5
    assert not lies_in(bytes([1]) * (2 * NBYTES), memory)
    assert all(each == bytes([n]) * (1 << 20) for n, each in enumerate(held))
    held.clear()
    assert used() == 0


@alone
def test_objects_of_all_sizes_come_and_go_and_keep_their_bytes() -> None:
    use()
    chance = random.Random(SEED)
    held: list[tuple[int, bytearray | bytes]] = []
    for step in range(4000):
        value = step % 251
        match chance.randrange(4):
            case 0 if held:
                value, data = held.pop(chance.randrange(len(held)))
                assert data.count(value) == len(data), step
            case 1 if held and isinstance(held[-1][1], bytearray):  # grows and shrinks where it is, or moves
                value, data = held[-1]
                assert isinstance(data, bytearray)
                more = chance.randrange(-len(data), 200_000)
                if more < 0:
                    del data[more:]
                else:
                    data += bytes([value]) * more
            case 2:
                held.append((value, bytearray([value]) * chance.randrange(300_000)))
            case _:
                held.append((value, bytes([value]) * chance.choice([10, LEAST - 40, LEAST, 100_000, 500_000])))
        while len(held) > 12:
            held.pop(0)
    assert used() > 0
    for value, data in held:
        assert data.count(value) == len(data)
    written = io.BytesIO()
    for n in range(100):
        written.write(bytes([n]) * 5000)
    assert written.getvalue() == b"".join(bytes([n]) * 5000 for n in range(100))
    del data, held, written
    assert used() == 0


@alone
def test_an_answer_is_the_message_that_it_would_be_elsewhere() -> None:
    memory = use(64 << 20)
    chance = random.Random(SEED)
    # Around where the length of the whole begins to need one byte more, too.
    sizes = [(128, 2048), (1, 8192), (7, 7168), *((1, columns) for columns in range((1 << 20) - 64, (1 << 20) + 8))]
    num_none = 0
    for (num_tokens, hidden_size), is_stream in itertools.product(sizes, (False, True)):
        dtype = chance.choice([1, 2, 3])
        if num_tokens == 1:
            dtype = 2
        request_id = chance.choice([0, 1, 300, 2**63])
        place = make_answer(is_stream, request_id, dtype, num_tokens, hidden_size)
        if num_tokens * hidden_size * 2 < LEAST:
            assert place is None
            continue
        if place is None:
            num_none += 1
            continue
        assert lies_in(place, memory)
        elements = chance.randbytes(num_tokens * hidden_size * (4 if dtype == 1 else 2))
        place[:] = elements
        numbers = [chance.choice([0, chance.randrange(2**20), 2**64 - 1]) for _ in range(8)]
        answer = answer_behind(place)
        assert answer is not None
        expected = CODEC.encode_response(
            is_stream, request_id, dtype, num_tokens, hidden_size, address_of(elements), *numbers, None
        )
        message = answer.finish(*numbers)
        assert message == expected
        assert lies_in(message, memory)
        with pytest.raises(RuntimeError, match="once"):
            answer.finish(*numbers)
    assert 0 < num_none < len(sizes)


@alone
def test_the_memory_of_an_answer_is_its_own_until_nobody_sees_it() -> None:
    use()
    place = make_answer(True, 1, 2, 16, 2048)
    assert place is not None
    place[:] = bytes([1]) * len(place)
    held = used()
    answer = answer_behind(place)
    assert answer is not None
    message = answer.finish(*range(8))
    del answer
    assert used() <= held
    copy = bytes(message)
    assert copy is message
    del message, copy
    assert used() > 0
    assert place.tobytes() == bytes([1]) * len(place)
    del place
    assert used() == 0
    place = make_answer(True, 1, 2, 16, 2048)
    del place  # it never came
    assert used() == 0
