"""How much of a text is known from those that were rendered before."""

from __future__ import annotations

import random

import pytest

from cachebus.keys import chunk_keys, root_key
from router.remembered import STARTS_BYTES, Guess, Remembered, text_of

CHUNK = 256
KEYS = chunk_keys(root_key(b"n" * 32), list(range(10_000)), CHUNK)


def words(seed: int, count: int) -> bytes:
    drawn = random.Random(seed)
    return b"".join(b"%03d " % drawn.randrange(1000) for _ in range(count))


def test_a_text_that_goes_on_from_a_known_one_has_its_chunks() -> None:
    """Four bytes are a token here."""
    known = Remembered()
    text = words(1, 10_000)
    assert known.find(b"s", text, CHUNK) is None
    known.add(b"s", text, 10_000, KEYS)
    assert known.find(b"s", text + words(2, 50), CHUNK) == Guess(10_050, KEYS)
    assert known.find(b"s", words(2, 10_000), CHUNK) is None
    assert known.find(b"other", text, CHUNK) is None, "another tenant's, or another model's"


def test_what_a_tenant_asked_is_forgotten_when_its_cache_is_cleared() -> None:
    known = Remembered()
    text = words(1, 10_000)
    for tenant in (b"a", b"b"):
        known.add(tenant, text, 10_000, KEYS, tenant)
        known.add(tenant, text + words(2, 9000), 19_000, KEYS, tenant)
    known.clear(b"a")
    assert known.find(b"a", text, CHUNK) is None
    assert known.find(b"b", text, CHUNK) is not None
    known.clear(b"")
    assert known.find(b"b", text, CHUNK) is None
    assert not known.texts


@pytest.mark.parametrize("alike", [2100, 5000, 9_990])
def test_what_differs_is_known_up_to_there_and_rather_too_little(alike: int) -> None:
    known = Remembered()
    text = words(1, 10_000)
    known.add(b"s", text, 10_000, KEYS)
    guess = known.find(b"s", text[: 4 * alike] + b"#" + words(3, 4000), CHUNK)
    assert guess is not None
    assert guess.tokens == pytest.approx(alike + 4000, abs=2)
    assert guess.keys == KEYS[: max(0, 10_000 - int((10_000 - alike) * 1.5)) // CHUNK]


def test_of_several_the_one_that_is_alike_for_longer_counts() -> None:
    known = Remembered()
    text = words(1, 10_000)
    other = text[:20_000] + words(3, 5000)
    known.add(b"s", text, 10_000, KEYS)
    known.add(b"s", other, 10_000, KEYS[:1])
    for one, keys in ((text, KEYS), (other, KEYS[:1])):
        guess = known.find(b"s", one, CHUNK)
        assert guess is not None
        assert guess.keys == keys


def test_a_text_shorter_than_the_first_beginning_is_not_known() -> None:
    known = Remembered()
    known.add(b"s", b"x" * (STARTS_BYTES[0] - 1), 500, KEYS)
    assert known.find(b"s", b"x" * 100_000, CHUNK) is None


def test_what_was_of_no_use_for_longest_is_forgotten() -> None:
    known = Remembered(bytes_max=120_000)
    texts = [words(seed, 10_000) for seed in range(4)]
    for text in texts[:3]:
        known.add(b"s", text, 10_000, KEYS)
    assert known.find(b"s", texts[0], CHUNK)
    known.add(b"s", texts[3], 10_000, KEYS)
    assert [known.find(b"s", text, CHUNK) is not None for text in texts] == [True, False, True, True]
    assert len(known._by_name) == 3 * 4
    known.add(b"s", words(9, 100_000), 10_000, KEYS)
    assert len(known._by_name) == 3 * 4, "one that is larger than all of it is not kept"


def test_tools_and_messages_make_a_chats_text() -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert text_of({"messages": messages, "temperature": 0}) == text_of({"messages": messages, "max_tokens": 5})
    assert text_of({"messages": messages}) != text_of({"messages": messages, "tools": [{"type": "function"}]})
    assert text_of({"prompt": "a\udc80"}) == b"a\xed\xb2\x80"


def test_a_text_that_is_rendered_again_and_again_takes_the_room_of_one() -> None:
    text, other = words(1, 1000), words(2, 1000)
    known = Remembered(bytes_max=2 * len(text))
    known.add(b"s", other, 1000, KEYS[:3])
    for _ in range(5):
        known.add(b"s", text, 1000, KEYS[:3])
        known.add(b"s", text[:-4] + b"end ", 1000, KEYS[:3])
    assert known.find(b"s", text, CHUNK) is not None
    assert known.find(b"s", other, CHUNK) is not None
    known.add(b"s", words(3, 1000), 1000, KEYS[:3])
    assert known.find(b"s", words(3, 1000), CHUNK) is not None
    assert known.find(b"s", other, CHUNK) is not None, "it was of use last"
    assert known.find(b"s", text, CHUNK) is None
