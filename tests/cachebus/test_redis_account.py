"""A tenant's account in the shared tier: what it comes to, and what goes first."""

from __future__ import annotations

import random

import pytest

from cachebus.redis_account import MEMBER_BYTES, Account, Chunk, chunk_of, taken_bytes
from cachebus.redis_names import PART_BYTES

SIZE = 100_000
EACH = taken_bytes(SIZE)


def chunk(number: int, length: int = SIZE) -> Chunk:
    return Chunk(number.to_bytes(32, "big"), length)


def account(*numbers: int) -> Account:
    made = Account(0.0)
    for number in numbers:
        assert not made.put(chunk(number), float(number))
    return made


def test_what_was_used_longest_ago_goes_first_and_no_more_than_must() -> None:
    held = account(1, 2, 3, 4)
    held.put(chunk(1), 5.0)
    assert held.drop_beyond(4 * EACH) == []
    assert held.drop_beyond(2 * EACH) == [chunk(2), chunk(3)]
    assert held.taken_bytes == 2 * EACH
    assert held.drop_beyond(0) == [chunk(4), chunk(1)]


def test_a_chunk_is_counted_once_and_under_its_last_length() -> None:
    held = account(1, 1)
    assert held.taken_bytes == EACH
    assert held.put(chunk(1, 5), 2.0) == [chunk(1)]
    assert held.taken_bytes == taken_bytes(5)
    assert held.drop(chunk(1).key) == [chunk(1, 5)]
    assert held.drop(chunk(1).key) == []
    assert held.taken_bytes == 0


def test_what_others_did_is_taken_in() -> None:
    held = account(1, 2, 3, 4)
    held.learn(3.0, [(chunk(9), 9.0), (chunk(3), 9.5)], 10.0)
    assert held.keys() == {chunk(number).key for number in (3, 4, 9)}
    assert held.taken_bytes == 3 * EACH
    assert held.learnt_at == 10.0
    assert held.drop_beyond(EACH) == [chunk(4), chunk(9)], "3 was used last"


def test_it_comes_to_what_its_chunks_do_whatever_happens() -> None:
    dice = random.Random(3)
    held, known = Account(0.0), dict[bytes, int]()
    for now in range(5000):
        one = chunk(dice.randrange(40), dice.choice((1, SIZE, PART_BYTES + 1)))
        what = dice.randrange(3)
        if what == 0:
            held.put(one, float(now))
            known[one.key] = one.length
        elif what == 1:
            assert [gone.length for gone in held.drop(one.key)] == [known.pop(one.key)] if one.key in known else not held.drop(one.key)
        else:
            for gone in held.drop_beyond(dice.randrange(40) * EACH):
                assert known.pop(gone.key) == gone.length
        assert held.taken_bytes == sum(map(taken_bytes, known.values()))
        assert held.keys() == set(known)


def test_a_member_says_which_chunk_it_is() -> None:
    assert len(chunk(7, 123).member()) == MEMBER_BYTES
    assert chunk_of(chunk(7, 123).member()) == chunk(7, 123)


@pytest.mark.parametrize(
    ("length", "parts"), [(1, [16]), (PART_BYTES - (1 << 20), [3 << 20]), (PART_BYTES, [4 << 20]), (2 * PART_BYTES + 1, [4 << 20, 4 << 20, 16])]
)
def test_a_part_takes_what_its_allocator_gives_it(length: int, parts: list[int]) -> None:
    """A header takes 320 bytes, each value 224 more."""
    assert taken_bytes(length) == sum(parts) + 320 + 224 * (len(parts) + 1)
