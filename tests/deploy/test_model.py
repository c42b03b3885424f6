"""The demo model: what a chat's hits and every comparison with plain vLLM rest on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cachebus.errors import HeadstartError
from deploy.model import ANSWER_TOKENS, VOCABULARY, alphabet, ensure_demo_model, make_model

Message = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads only get in each other's way at this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def prompt_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False))


def test_every_character_is_one_token_and_every_token_one_character() -> None:
    assert len(set(alphabet())) == VOCABULARY
    assert {len(character) for character in alphabet()} == {1}


def test_text_of_any_ids_gives_the_ids_again(tokenizer: Any) -> None:
    generator = random.Random(11)
    for _ in range(10_000):
        ids = [generator.randrange(VOCABULARY) for _ in range(generator.randrange(1, 40))]
        for skip in (True, False):
            text = tokenizer.decode(ids, skip_special_tokens=skip)
            assert tokenizer.encode(text) == ids
            assert tokenizer.encode(text, add_special_tokens=False) == ids


def test_each_id_decodes_alone_as_it_does_among_others(tokenizer: Any) -> None:
    # A stream is made of pieces: they must add up to the whole text.
    ids = list(range(VOCABULARY))
    assert "".join(tokenizer.decode([token]) for token in ids) == tokenizer.decode(ids)


def test_a_chats_next_prompt_begins_with_the_turn_before(tokenizer: Any) -> None:
    generator = random.Random(12)
    messages: list[Message] = [{"role": "system", "content": "Be brief.\n"}]
    for turn in range(50):
        messages.append({"role": "user", "content": f" question {turn}? "})
        before = prompt_ids(tokenizer, messages)
        answer = [generator.randrange(VOCABULARY) for _ in range(24)]
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
        after = prompt_ids(tokenizer, [*messages, {"role": "user", "content": "next"}])
        assert after[: len(before) + len(answer)] == before + answer


def test_the_template_takes_parts_tools_and_empty_contents(tokenizer: Any) -> None:
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False) == plain
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tools=tools, tokenize=False) == plain
    assert tokenizer.apply_chat_template([{"role": "assistant", "content": None}], tokenize=False)


@pytest.mark.usefixtures("one_thread")
def test_the_prompt_decides_the_answer_and_clearly(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert 25e6 < sum(weights.numel() for weights in model.parameters()) < 30e6
    generator = random.Random(13)
    answers, margins = set(), []
    for length in (5, 50, 200) * 2:
        prompt = torch.tensor([[generator.randrange(5, VOCABULARY) for _ in range(length)]])
        made = model.generate(prompt, max_new_tokens=16, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
        answer = tuple(made.sequences[0, length:].tolist())
        assert len(set(answer)) > 12, "the answer repeats itself"
        answers.add(answer)
        margins += [float(-logits[0].topk(2).values.diff()) for logits in made.logits]
    assert len(answers) == 6
    # Float32 sums in another order differ by about 1e-3 here.
    assert sorted(margins)[len(margins) // 10] > 0.05
    assert sorted(margins)[len(margins) // 2] > 1


@pytest.mark.usefixtures("one_thread")
def test_one_early_token_changes_what_comes_last(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = random.Random(14)
    ids = [generator.randrange(5, VOCABULARY) for _ in range(256)]
    with torch.no_grad():
        one = model(torch.tensor([ids])).logits[0, -1]
        other = model(torch.tensor([[*ids[:10], (ids[10] + 1) % VOCABULARY, *ids[11:]]])).logits[0, -1]
    assert float((one - other).abs().mean()) > 1
    assert int(one.argmax()) != int(other.argmax())


def test_the_same_recipe_gives_the_same_bytes_and_is_reused(tmp_path: Path, folder: Path) -> None:
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    first = ensure_demo_model(environ)
    made = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert (first / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert ensure_demo_model(environ) == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == made
    assert [path.name for path in first.parent.iterdir()] == [first.name], "something half made is left"


def test_an_answer_has_an_end_where_the_client_names_none(folder: Path) -> None:
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == ANSWER_TOKENS


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "headstart").write_text("a file where a folder must be")
    with pytest.raises(HeadstartError, match="XDG_CACHE_HOME"):
        ensure_demo_model({"XDG_CACHE_HOME": str(tmp_path)})
