"""The simulated model against its oracle, without a bus."""

from __future__ import annotations

import itertools

import pytest

from cachebus.engine.blocks import Entry
from deploy.sim.expected import expected_tokens
from deploy.sim.model import Model
from deploy.sim.profile import Profile
from deploy.sim.scheduler import Part, Scheduled, Work
from deploy.sim.vocabulary import FIRST_WORD, chat_prompt, text_of, text_of_words, tokenised

PROFILE = Profile(blocks=64, max_model_len=512, max_num_batched_tokens=64, pull_ms=0)
FAST = 1e6


def answer(model: Model, prompt: list[int], count: int, blocks: list[int], parts: list[int], start: int = 0, name: str = "r") -> list[int]:
    """Generates as an engine would, the prompt from ``start`` on in steps of ``parts`` tokens."""
    work = Work(name, list(prompt), count, blocks=blocks, computed=start)
    sizes = itertools.chain(parts, itertools.repeat(len(prompt)))
    while work.generated < count:
        tokens = min(next(sizes) if work.computed < len(prompt) else 1, len(work.tokens) - work.computed)
        (token,) = model.forward([Part(work, work.computed, tokens, Scheduled(name, [], False, work.computed, tokens))])
        work.computed += tokens
        if token is not None:
            work.tokens.append(token)
    model.forget(name)
    return work.tokens[len(prompt) :]


PROMPT = [7 * n % 1000 for n in range(61)]
EXPECTED = expected_tokens(PROFILE.model, PROFILE.layers, PROMPT, 40)


@pytest.mark.parametrize("parts", [[61], [1] * 61, [16, 16, 16], [5, 40], [17, 1, 1, 30]])
def test_an_answer_is_the_oracles_however_its_prompt_is_cut(parts: list[int]) -> None:
    assert answer(Model(PROFILE, FAST), PROMPT, 40, [9, 3, 60, 0, 12, 13, 14], parts) == EXPECTED


def test_every_token_of_a_prompt_counts() -> None:
    answers = {tuple(expected_tokens("m", 2, [*PROMPT[:n], PROMPT[n] + 1, *PROMPT[n + 1 :]], 2)) for n in range(61)}
    assert len(answers) == 61
    assert tuple(expected_tokens("m", 2, PROMPT, 2)) not in answers
    assert expected_tokens("another", 2, PROMPT, 2) != expected_tokens("m", 2, PROMPT, 2)


def test_kv_that_travels_is_read_and_each_byte_of_it_counts() -> None:
    source = Model(PROFILE, FAST)
    answer(source, PROMPT, 1, [1, 2, 3, 4], [61])
    extent = memoryview(bytearray(3 * source.block_bytes))
    (digest,) = source.save([Entry([1, 2, 3], extent)], b"k" * 32)
    for place in (-1, 0, 8, 300, len(extent) - 1):
        target = Model(PROFILE, FAST)
        if place >= 0:
            extent[place] ^= 1
        (arrived,) = target.load([Entry([40, 41, 42], extent)], b"k" * 32)
        found = answer(target, PROMPT, 40, [40, 41, 42, 43, 50, 51, 52], [13], start=48)
        assert (arrived == digest) == (place < 0)
        assert found == EXPECTED if place < 0 else not any(map(int.__eq__, found, EXPECTED))
        assert target.load([Entry([40, 41, 42], extent)], None) == [b""]
        if place >= 0:
            extent[place] ^= 1


def test_a_block_left_out_is_digested_as_it_lies_in_the_extent() -> None:
    source, target = Model(PROFILE, FAST), Model(PROFILE, FAST)
    answer(source, PROMPT, 1, [1, 2, 3, 4], [61])
    extent = memoryview(bytearray(2 * source.block_bytes))
    assert source.save([Entry([1, 2], extent)], b"k" * 32) == target.load([Entry([-1, 5], extent)], b"k" * 32)


def test_kv_that_is_overwritten_under_a_running_request_shows_in_its_last_token() -> None:
    model = Model(PROFILE, FAST)
    work = Work("r", list(PROMPT), 3, blocks=[1, 2, 3, 4])
    (first,) = model.forward([Part(work, 0, 61, Scheduled("r", [], True, 0, 61))])
    assert first is not None
    work.tokens.append(first)
    answer(model, [5] * 16, 1, [2], [16], name="another")
    for computed in (61, 62):
        (token,) = model.forward([Part(work, computed, 1, Scheduled("r", [], False, computed, 1))])
        assert token is not None
        work.tokens.append(token)
    assert work.tokens[61:63] == EXPECTED[:2]
    assert work.tokens[63] != EXPECTED[2]


def test_what_is_generated_is_tokenised_to_the_same_ids_after_any_text() -> None:
    for before in ("", "x", "the cat", "ab", "abc", "line\n"):
        assert tokenised(before + text_of(EXPECTED)) == tokenised(before) + EXPECTED
    assert all(token >= FIRST_WORD for token in EXPECTED)
    assert text_of_words(EXPECTED) == text_of(EXPECTED)
    text = "a word and 123 more, abc def  ghi\n"
    assert text_of(tokenised(text)) == text
    assert len(tokenised(text)) < len(text)


def test_a_chats_next_turn_begins_with_the_last_one_and_its_answer() -> None:
    turn = [{"role": "user", "content": [{"type": "text", "text": "Héllo"}]}]
    first = chat_prompt(turn)
    second = chat_prompt([*turn, {"role": "assistant", "content": text_of(EXPECTED)}, {"role": "user", "content": "more"}])
    assert second[: len(first) + len(EXPECTED)] == first + EXPECTED
    with pytest.raises(ValueError, match="text alone"):
        chat_prompt([{"role": "user", "content": [{"type": "image_url"}]}])
