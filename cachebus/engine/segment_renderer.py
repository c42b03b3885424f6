"""vLLM's renderer for Hugging Face tokenizers, with the segment cache before the tokenizer. Written for vLLM 0.25.1 and 0.32.0.

The renderer is where every text that becomes a prompt is tokenised: chats, completions, responses, ``/render`` and ``/tokenize``. vLLM does
it in a thread; so is it done here. Where the cache is not sure, or is asked for more than ids, the renderer does what it does without.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
from prometheus_client import Counter
from vllm.logger import init_logger
from vllm.renderers.hf import HfRenderer
from vllm.renderers.registry import RENDERER_REGISTRY

from cachebus.engine.segment_tokenizer import NotSplittable, SegmentTokenizer

# Under vLLM's own name, whose loggers are set up in an engine's process.
_log = init_logger("vllm.headstart")
_HF = "hf"
_UNDERSTOOD = frozenset({"truncation", "max_length", "add_special_tokens"})

_BYTES = Counter("headstart_tokenized_bytes", "Bytes of prompts' texts, by where their token ids came from", ["source"])
_salt: contextvars.ContextVar[str] = contextvars.ContextVar("salt", default="")


class SegmentCacheSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``bytes_max``: room for token ids. ``salted_only``: what has no ``cache_salt`` is neither kept nor found, since it may be any tenant's."""

    bytes_max: int
    salted_only: bool = False


class SegmentRenderer(HfRenderer):
    """Tokenises each segment of a text once, per ``cache_salt``."""

    settings = SegmentCacheSettings(0)
    """Of all renderers of the process: vLLM makes them, and hands them nothing of ours."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._segments = _segments(config, tokenizer, self.settings.bytes_max)
        for source in ("cached", "computed"):
            _BYTES.labels(source)
        # vLLM's own runs the same in a thread that knows nothing of the request.
        self._tokenize_prompt_async = self._tokenize_in_thread

    async def render_chat_async(self, *args: Any, prompt_extras: Mapping[str, Any] | None = None, **more: Any) -> Any:
        with _salted(prompt_extras):
            return await super().render_chat_async(*args, prompt_extras=prompt_extras, **more)

    async def render_cmpl_async(self, *args: Any, prompt_extras: Mapping[str, Any] | None = None, **more: Any) -> Any:
        with _salted(prompt_extras):
            return await super().render_cmpl_async(*args, prompt_extras=prompt_extras, **more)

    async def _tokenize_in_thread(self, prompt: Any, params: Any) -> Any:
        work = functools.partial(contextvars.copy_context().run, self._tokenize_prompt, prompt, params)
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        ids = self._from_segments(prompt, params)
        return super()._tokenize_prompt(prompt, params) if ids is None else self._build_tokens_prompt(ids, prompt)

    def _from_segments(self, prompt: Any, params: Any) -> list[int] | None:
        """The prompt's ids; None where the plain tokenizer is to be asked: for places of tokens, and for what has to be cut short."""
        salt, wanted = _salt.get(), params.get_encode_kwargs()
        if (
            self._segments is None
            or (self.settings.salted_only and not salt)
            or not wanted.keys() <= _UNDERSTOOD
            or self._wants_offsets(prompt, params)
        ):
            return None
        try:
            encoded = self._segments.encode(prompt["prompt"], salt, add_special_tokens=wanted["add_special_tokens"])
        except UnicodeEncodeError:
            return None
        if wanted.get("truncation") and len(encoded.ids) > wanted["max_length"]:
            return None
        _BYTES.labels("cached").inc(encoded.bytes_known)
        _BYTES.labels("computed").inc(encoded.bytes_all - encoded.bytes_known)
        return encoded.ids


def use_segment_cache(settings: SegmentCacheSettings) -> None:
    """Has vLLM make such renderers in this process, for every tokenizer mode that would have vLLM's own."""
    SegmentRenderer.settings = settings
    RENDERER_REGISTRY.renderers[_HF] = (SegmentRenderer.__module__, SegmentRenderer.__qualname__)


@contextmanager
def _salted(prompt_extras: Mapping[str, Any] | None) -> Iterator[None]:
    token = _salt.set((prompt_extras or {}).get("cache_salt") or "")
    try:
        yield
    finally:
        _salt.reset(token)


def _segments(config: Any, tokenizer: Any, bytes_max: int) -> SegmentTokenizer | None:
    """None, and the reason in the log, where prompts are tokenised whole."""
    try:
        if config.model_config.enable_prompt_embeds:
            raise NotSplittable("vLLM adds a token for prompt embeddings to it")
        segments = SegmentTokenizer(tokenizer, bytes_max)
    except NotSplittable as reason:
        _log.warning("headstart: this tokenizer's prompts are tokenised whole each time (model.segment_cache_mb has no effect): %s", reason)
        return None
    where = "at added tokens and between words" if segments.cuts_words else "at added tokens only"
    _log.info("headstart: prompts are tokenised by segments, cut %s", where)
    return segments
