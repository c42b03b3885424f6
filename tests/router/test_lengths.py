from __future__ import annotations

from router.lengths import Lengths


def test_before_anything_is_known_every_byte_may_be_a_token() -> None:
    assert Lengths().tokens_max("m", 900) == 900


def test_the_densest_request_seen_decides() -> None:
    lengths = Lengths()
    for body_bytes in (4000, 3000, 5000):
        lengths.learn("m", body_bytes, 1000)
    assert 1000 < lengths.tokens_max("m", 3000) <= 1250
    assert lengths.tokens_max("another", 3000) == 3000


def test_one_odd_request_is_forgotten() -> None:
    lengths = Lengths()
    lengths.learn("m", 1000, 1000)
    for _ in range(2000):
        lengths.learn("m", 4000, 1000)
    assert lengths.tokens_max("m", 4000) == 1250


def test_a_request_without_tokens_teaches_nothing() -> None:
    lengths = Lengths()
    lengths.learn("m", 1000, 0)
    assert lengths.tokens_max("m", 900) == 900
