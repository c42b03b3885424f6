"""A text's ids come out as from the plain tokenizer, however it is cut and whatever was tokenised before."""

from __future__ import annotations

import functools
import json
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import CHAT, KINDS, WORDS_CUT, byte_level, fast, metaspace, of_kind, special, text_of_ours
from tokenizers import NormalizedString, PreTokenizedString, Tokenizer, models, pre_tokenizers

from cachebus.engine.segment_tokenizer import NotSplittable, SegmentTokenizer
from cachebus.engine.text_cuts import text_cuts

PARTS = (
    "word",
    " word",
    "Word",
    "don't",
    "'s",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    ".",
    ",",
    "12",
    "e\u0301",
    "\u4f60\u597d",
    "\u3002",
    "\ud55c",
    "<",
    "|>",
    "d ",
)


@functools.cache
def splitting(name: str) -> SegmentTokenizer:
    return SegmentTokenizer(of_kind(name), 1 << 20)


def added(name: str) -> list[str]:
    return [token["content"] for token in json.loads(of_kind(name).backend_tokenizer.to_str())["added_tokens"]]


def texts(name: str) -> st.SearchStrategy[str]:
    any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    parts = st.one_of(st.sampled_from(PARTS), st.sampled_from(added(name) or PARTS), st.sampled_from(PARTS), any_text)
    return st.lists(parts, max_size=30).map("".join)


@pytest.mark.parametrize("name", KINDS)
def test_cut_anywhere_it_may_be_a_text_has_the_same_ids(name: str) -> None:
    tokenizer, ours = of_kind(name), splitting(name)

    @settings(max_examples=100, deadline=None)
    @given(text=texts(name), chars_min=st.integers(1, 8), chars_long=st.integers(1, 8), ends=st.booleans())
    def check(text: str, chars_min: int, chars_long: int, ends: bool) -> None:
        plain = tokenizer(text, add_special_tokens=ends)["input_ids"]
        cuts = ours.cuts.of(text, chars_min, chars_long)
        assert cuts == sorted(set(cuts))
        for _ in range(2):
            assert ours.encode(text, "", add_special_tokens=ends, cuts=cuts).ids == plain
        assert ours.encode(text, "", add_special_tokens=ends).ids == plain

    check()


@pytest.mark.parametrize("name", KINDS)
def test_texts_that_begin_alike_are_cut_alike(name: str) -> None:
    cuts = splitting(name).cuts

    @settings(max_examples=50, deadline=None)
    @given(text=texts(name), more=texts(name))
    def check(text: str, more: str) -> None:
        before, after = cuts.of(text, 4, 4), cuts.of(text + more, 4, 4)
        # The last part may be an added token's beginning.
        sure = len(text) - max(map(len, added(name)), default=1)
        assert [at for at in before if at < sure] == [at for at in after if at < sure]

    check()


@pytest.mark.parametrize("name", KINDS)
def test_words_are_cut_where_it_is_proven(name: str) -> None:
    assert splitting(name).cuts_words == (name in WORDS_CUT)


@pytest.mark.parametrize("name", WORDS_CUT)
def test_a_long_text_that_goes_on_otherwise_is_computed_from_there(name: str) -> None:
    ours, text = SegmentTokenizer(of_kind(name), 1 << 24), text_of_ours()
    if name == "characters":
        text = text.encode("ascii", "ignore").decode()
    assert ours.encode(text, "", add_special_tokens=True).bytes_known == 0
    changed = text[:-500] + "Else."
    again = ours.encode(changed, "", add_special_tokens=True)
    assert again.ids == of_kind(name)(changed)["input_ids"]
    assert again.bytes_known > again.bytes_all - 8000
    assert ours.encode(text, "", add_special_tokens=True).bytes_known == len(text.encode())


@pytest.mark.parametrize("name", ["Metaspace first", "Llama 2", "BERT", "Llama 3"])
def test_a_system_prompt_is_tokenised_once(name: str) -> None:
    ours = SegmentTokenizer(of_kind(name), 1 << 20)
    system = CHAT[0] + "system\n" + text_of_ours()[:1900]
    turns = [f"{CHAT[1]}{CHAT[0]}user\n{'question ' * 20}{turn}" for turn in range(3)]
    assert ours.encode(system + turns[0], "", add_special_tokens=False).bytes_known == 0
    for turn in turns[1:]:
        found = ours.encode(system + turn, "", add_special_tokens=False)
        assert found.ids == of_kind(name)(system + turn, add_special_tokens=False)["input_ids"]
        assert found.bytes_known == len(system.encode())


def test_what_another_salt_asked_is_not_known() -> None:
    ours, text = SegmentTokenizer(of_kind("Llama 3"), 1 << 20), text_of_ours()[:5000]
    assert [ours.encode(text, salt, add_special_tokens=True).bytes_known for salt in ("one", "other", "", "one")] == [0, 0, 0, len(text.encode())]


def test_threads_see_the_same() -> None:
    ours, text = SegmentTokenizer(of_kind("Llama 3"), 200_000), text_of_ours()
    prompts = [text[at : at + 20_000] for at in range(0, 60_000, 3000)]
    plain = [of_kind("Llama 3")(prompt)["input_ids"] for prompt in prompts]
    wrong: list[int] = []

    def ask() -> None:
        wrong.extend(at for at, prompt in enumerate(prompts) if ours.encode(prompt, "", add_special_tokens=True).ids != plain[at])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_half_of_a_pair_is_refused_as_by_the_plain_tokenizer() -> None:
    with pytest.raises(UnicodeEncodeError):
        splitting("Llama 3").encode("word \ud800 word", "", add_special_tokens=True)


class ByOneself:
    """A pre-tokenizer in Python, which looks at where in the text a piece lies."""

    def pre_tokenize(self, pretokenized: PreTokenizedString) -> None:
        pretokenized.split(self._halves)

    def _halves(self, _number: int, piece: NormalizedString) -> list[NormalizedString]:
        return [piece]


def drawn() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.model.dropout = 0.1
    return tokenizer


def without_anything() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


class Shouting(type(of_kind("GPT-2"))):  # type: ignore[misc]
    """One that does more than its configuration says."""

    def _encode_plus(self, text: Any, *args: Any, **more: Any) -> Any:
        return super()._encode_plus(text.upper(), *args, **more)


def test_what_is_not_certain_is_not_cut() -> None:
    splitting_itself = fast(byte_level())
    splitting_itself.split_special_tokens = True
    in_python = fast(byte_level())
    in_python.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(ByOneself())
    refused = {
        "can't be read": in_python,
        "draws": fast(drawn()),
        "neither": fast(without_anything()),
        "way of its own": Shouting(tokenizer_object=byte_level()),
        "splits special tokens": splitting_itself,
    }
    for reason, tokenizer in refused.items():
        with pytest.raises(NotSplittable, match=reason):
            SegmentTokenizer(tokenizer, 1000)


def test_a_wrong_rule_is_noticed_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial must be able to fail: with tokens that take white space before them cut like others, it does."""
    tokenizer = metaspace("first")
    tokenizer.add_tokens([special("<left>", lstrip=True)])

    def careless(config: dict[str, Any]) -> Any:
        return text_cuts({**config, "added_tokens": [{**token, "lstrip": False} for token in config["added_tokens"]]})

    SegmentTokenizer(fast(tokenizer), 1000)
    monkeypatch.setattr("cachebus.engine.segment_tokenizer.text_cuts", careless)
    with pytest.raises(NotSplittable, match="other tokens"):
        SegmentTokenizer(fast(tokenizer), 1000)
