"""Where a text may be cut, from a tokenizer's configuration alone."""

from __future__ import annotations

import functools
import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import DEEPSEEK, LLAMA3, O200K, QWEN2, by_character, byte_level, metaspace, special, text_of_ours
from tokenizers import Tokenizer

from cachebus.engine.text_cuts import text_cuts

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def config(tokenizer: Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def pieces(text: str, cuts: list[int]) -> list[str]:
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


@functools.cache
def without_added_tokens() -> dict[str, Any]:
    return {**config(metaspace("first")), "added_tokens": []}


def added(*contents: str, **flags: bool) -> dict[str, Any]:
    return {**without_added_tokens(), "added_tokens": [_token(content, **flags) for content in contents]}


def _token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **flags}


def test_a_segment_begins_with_an_added_token() -> None:
    cuts = text_cuts(added("<a>", "<b>"))
    assert pieces("x<a>y<b><b>", cuts.of("x<a>y<b><b>", 1)) == ["x", "<a>y", "<b>", "<b>"]
    assert pieces("x<a>y<b><b>", cuts.of("x<a>y<b><b>", 4)) == ["x<a>y", "<b><b>"]


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"single_word": True}, {"normalized": True}])
def test_not_with_one_that_looks_beside_it(flags: dict[str, bool]) -> None:
    assert text_cuts(added("<a>", **flags)).of("x <a>y <a>", 1) == [0]
    assert text_cuts(added("<a>", rstrip=True)).of("x <a> y", 1) == [0, 2]


def test_not_behind_one_that_looks_at_what_follows() -> None:
    cuts = text_cuts({**added(), "added_tokens": [_token("word", single_word=True), _token("b<")]})
    assert cuts.of("wordb<", 1) == [0]
    assert cuts.of("word b<", 1) == [0, 5]


def test_not_with_one_that_a_wider_one_before_it_may_eat() -> None:
    cuts = text_cuts({**added(), "added_tokens": [_token("<a>", rstrip=True), _token(" ")]})
    assert cuts.of("x<a>  y", 1) == [0, 1]


@given(st.lists(st.text("ab|<>", min_size=1, max_size=4), min_size=1, max_size=8, unique=True), st.text("ab|<>", max_size=40))
def test_the_leftmost_and_of_those_the_longest_is_found(tokens: list[str], text: str) -> None:
    found = text_cuts(added(*tokens)).tokens
    assert found is not None
    longest_first = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    assert [m.span() for m in found.finditer(text)] == [m.span() for m in longest_first.finditer(text)]


def test_thousands_of_added_tokens_cost_a_text_no_more() -> None:
    few, many = (text_cuts(added(*(f"<unused{n}>" for n in range(count)))).tokens for count in (10, 6000))
    assert few is not None
    assert many is not None
    assert len(many.pattern) < 200_000
    text = "<unused9><unus" * 1000
    assert [m.group() for m in many.finditer(text)] == [m.group() for m in few.finditer(text)] == ["<unused9>"] * 1000


@pytest.mark.parametrize("content", ["", "x" * 201])
def test_added_tokens_that_nobody_can_look_for(content: str) -> None:
    with pytest.raises(ValueError, match="added token"):
        text_cuts(added(content))


@pytest.mark.parametrize("expression", ["", QWEN2, LLAMA3, O200K, DEEPSEEK])
def test_words_are_cut_behind_letters(expression: str) -> None:
    cuts, text = text_cuts(config(byte_level(expression))), text_of_ours()[:50_000]
    found = pieces(text, cuts.of(text, 1, 100))
    assert "".join(found) == text
    assert len(found) > 250
    assert all(one[-1].isalpha() and not two[0].isalnum() for one, two in itertools.pairwise(found))


@pytest.mark.parametrize(
    "expression",
    [
        pytest.param(LLAMA3 + r"|\w+\s", id="one more alternative"),
        pytest.param(LLAMA3.replace(r"[^\r\n\p{L}\p{N}]?\p{L}+|", "", 1), id="none for letters"),
        pytest.param(O200K.replace(r"\p{Ll}", r"\p{Lu}"), id="none for small letters"),
        pytest.param(r"\s+", id="white space alone"),
        pytest.param(LLAMA3.replace(r"\s+(?!\S)", r"\s+(?!\S\S)"), id="looks further"),
        pytest.param(f"(?:{LLAMA3})", id="in brackets"),
    ],
)
def test_an_expression_that_is_not_known_is_not_cut(expression: str) -> None:
    assert text_cuts(config(byte_level(expression))).words is None


def test_nor_what_is_normalised_or_split_in_other_ways() -> None:
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": BYTES},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES, BYTES]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {**BYTES, "use_regex": True}]}},
    ):
        assert text_cuts({**config(byte_level()), **change}).words is None
    split = config(by_character())
    assert text_cuts(split).words is not None
    assert text_cuts({**split, "pre_tokenizer": {**split["pre_tokenizer"], "behavior": "MergedWithNext"}}).words is None


def test_nor_where_an_added_token_reaches_over_words() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([special("New York", normalized=True)])
    assert text_cuts(config(tokenizer)).words is None
