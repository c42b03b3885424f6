"""Prompts of an exact length, for tokenizers that take a character, a piece or a word as a token."""

from __future__ import annotations

import math

import pytest

from cachebus.errors import HeadstartError
from deploy.bench.texts import Count, exact_text


def of_characters(text: str) -> int:
    return len(text)


def of_pieces_with_a_start(text: str) -> int:
    return 1 + math.ceil(len(text) / 4)


def of_words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("count", [of_characters, of_pieces_with_a_start, of_words])
@pytest.mark.parametrize("tokens", [2, 255, 700, 8400])
def test_text_has_the_wanted_length_and_depends_on_its_seed_alone(count: Count, tokens: int) -> None:
    text = exact_text(tokens, count, "a")
    assert count(text) == tokens
    assert exact_text(tokens, count, "a") == text
    assert exact_text(700, count, "b")[:50] != exact_text(700, count, "a")[:50]


def test_a_length_that_no_text_has_is_refused() -> None:
    with pytest.raises(HeadstartError, match="exactly 7 tokens"):
        exact_text(7, lambda text: 2 * len(text), "a")
