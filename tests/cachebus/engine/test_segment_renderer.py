"""vLLM's own renderer with the cache before its tokenizer: the same prompts, from a thread, apart by salt."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from tokenizer_kinds import CHAT, LLAMA3, byte_level, fast, text_of_ours
from vllm.config import ModelConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.renderers.registry import RENDERER_REGISTRY, renderer_from_config

from cachebus.engine.segment_renderer import SegmentCacheSettings, SegmentRenderer, use_segment_cache
from deploy.model import make_model

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
TOKENS_MAX = 32_768


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    folder: Path = tmp_path_factory.mktemp("model")
    make_model(folder, layers=1)
    tokenizer = fast(byte_level(LLAMA3))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return VllmConfig(model_config=ModelConfig(model=str(folder)))


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(SegmentRenderer, "settings", SegmentRenderer.settings)
    monkeypatch.setattr(RENDERER_REGISTRY, "renderers", dict(RENDERER_REGISTRY.renderers))
    yield


def renderer(config: VllmConfig, **settings: Any) -> SegmentRenderer:
    use_segment_cache(SegmentCacheSettings(bytes_max=1 << 20, **settings))
    made = renderer_from_config(config)
    assert type(made) is SegmentRenderer
    return made


def tokenized(source: str) -> float:
    return REGISTRY.get_sample_value("headstart_tokenized_bytes_total", {"source": source}) or 0.0


def ids_of(made: HfRenderer, text: str, salt: str = "", **params: Any) -> list[int]:
    extras = {"cache_salt": salt} if salt else {}
    wanted = TokenizeParams(max_total_tokens=TOKENS_MAX, **params)
    (prompt,) = asyncio.run(made.render_cmpl_async([{"prompt": text}], wanted, prompt_extras=extras))
    return list(prompt["prompt_token_ids"])


def test_texts_and_chats_are_those_of_plain_vllm(config: VllmConfig) -> None:
    plain, ours = renderer_from_config(config), renderer(config)
    assert type(plain) is HfRenderer
    text = text_of_ours()
    chat = [{"role": "system", "content": text[:9000]}, {"role": "user", "content": f"{text[9000:9500]}{CHAT[0]} <s>"}]
    for prompt in (text[:30_000], "", " ", CHAT[0], text[:2500] + CHAT[1]):
        for ends in (False, True):
            assert [ids_of(ours, prompt, add_special_tokens=ends) for _ in range(2)] == [ids_of(plain, prompt, add_special_tokens=ends)] * 2
    found = [asyncio.run(one.render_chat_async([chat], ChatParams()))[1][0]["prompt_token_ids"] for one in (plain, ours, ours)]
    assert found[0] == found[1] == found[2]


def test_what_was_asked_before_is_not_computed(config: VllmConfig) -> None:
    ours, text = renderer(config), text_of_ours()[:20_000]
    size, computed, cached = len(text.encode()), tokenized("computed"), tokenized("cached")
    ids_of(ours, text)
    assert (tokenized("computed") - computed, tokenized("cached") - cached) == (size, 0)
    ids_of(ours, text)
    assert (tokenized("computed") - computed, tokenized("cached") - cached) == (size, size)


def test_salts_are_kept_apart(config: VllmConfig) -> None:
    ours, text = renderer(config), text_of_ours()[:5000]
    cached = tokenized("cached")
    for salt in ("one", "other", ""):
        ids_of(ours, text, salt)
    assert tokenized("cached") == cached
    ids_of(ours, text, "one")
    assert tokenized("cached") == cached + len(text.encode())


def test_where_there_are_tenants_a_text_without_a_salt_is_not_kept(config: VllmConfig) -> None:
    ours, plain, text = renderer(config, salted_only=True), renderer_from_config(config), text_of_ours()[:5000]
    before = tokenized("cached"), tokenized("computed")
    assert ids_of(ours, text) == ids_of(ours, text) == ids_of(plain, text)
    assert (tokenized("cached"), tokenized("computed")) == before


def test_what_is_too_long_or_cut_short_is_as_with_plain_vllm(config: VllmConfig) -> None:
    plain, ours = renderer_from_config(config), renderer(config)
    text = text_of_ours()[:8000]
    for side in (None, "left", "right"):
        shortened = {"truncate_prompt_tokens": 100, "truncation_side": side}
        assert ids_of(ours, text, **shortened) == ids_of(plain, text, **shortened)
    for one in (plain, ours):
        with pytest.raises(VLLMValidationError, match="maximum context length"):
            ids_of(one, "many words " * TOKENS_MAX)


def test_half_of_a_pair_is_refused_alike(config: VllmConfig) -> None:
    for one in (renderer_from_config(config), renderer(config)):
        with pytest.raises((TypeError, UnicodeEncodeError, ValueError)):
            ids_of(one, "\ud800")


def test_the_loop_is_free_meanwhile(config: VllmConfig) -> None:
    ours, threads = renderer(config), set()
    assert ours._segments is not None
    encode = ours._segments.encode

    def noting(*args: Any, **more: Any) -> Any:
        threads.add(threading.current_thread())
        return encode(*args, **more)

    ours._segments.encode = noting  # type: ignore[method-assign]
    ids_of(ours, text_of_ours()[:3000])
    assert threads and threading.main_thread() not in threads


def test_a_tokenizer_that_is_not_certain_is_left_alone(config: VllmConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_model(tmp_path, layers=1)
    tokenizer = fast(byte_level())
    tokenizer.backend_tokenizer.model.dropout = 0.5
    tokenizer.save_pretrained(tmp_path)
    use_segment_cache(SegmentCacheSettings(bytes_max=1 << 20))
    made = renderer_from_config(VllmConfig(model_config=ModelConfig(model=str(tmp_path))))
    before = tokenized("computed")
    assert made._segments is None
    assert ids_of(made, text_of_ours()[:3000])
    assert tokenized("computed") == before


def test_other_modes_have_their_own_renderers() -> None:
    others = {mode: made for mode, made in RENDERER_REGISTRY.renderers.items() if mode != "hf"}
    use_segment_cache(SegmentCacheSettings(bytes_max=1))
    assert {mode: made for mode, made in RENDERER_REGISTRY.renderers.items() if mode != "hf"} == others
    assert "mistral" in others
