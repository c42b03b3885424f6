"""A Hugging Face tokenizer that tokenises no text segment twice, and gives exactly the ids that it gives without.

Whether it can is decided from the tokenizer's own configuration, and then tried: before it is used it must agree with the plain tokenizer on
texts made of the tokenizer's own added tokens and of what is known to trip tokenizers, cut at every place where a cut is allowed.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cachebus.engine.segment_cache import SegmentCache, TokenIds
from cachebus.engine.text_cuts import text_cuts

_TRIED_TEXTS, _TRIED_PARTS, _TRIED_TOKENS = 300, 12, 64
_TRIED = (
    *("word", " word", "Word", "  two", " ", "   ", "\n", "\n\n", " \n", "\t", "\r\n", "\u00a0", ". ", ",", "...", "'s", "'LL", "don't", "x='re"),
    *(
        "12",
        " 3456",
        "7.8",
        "e\u0301",
        "\u0301",
        "\u212b",
        "\ufb01",
        "\u4f60\u597d",
        "\u3002",
        "\u3053\u3068\u3002",
        "\ud55c\uae00 ",
        "\u1112\u1161\u11ab",
    ),
    *("\U0001f600", "\u200b", "\u0130I", "<", "<|", "|>", "</s", "_", "\u2581", "\u0120", "\u25a1", "a" * 40, "\x00"),
)
"""Parts of the texts that are tried."""


class NotSplittable(Exception):
    """A tokenizer whose texts must be tokenised whole, and why."""


@dataclass(frozen=True)
class Encoded:
    """A text's ids, and of how many of its bytes (UTF-8) the ids were known."""

    ids: list[int]
    bytes_known: int
    bytes_all: int


class SegmentTokenizer:
    """Makes the same of a text as ``tokenizer(text, add_special_tokens=...)["input_ids"]``; safe to use by several threads.

    Raises NotSplittable where that is not certain. ``bytes_max``: room for ids, in bytes.
    """

    def __init__(self, tokenizer: Any, bytes_max: int) -> None:
        backend = _backend(tokenizer)
        try:
            text = backend.to_str()
        except Exception as error:
            raise NotSplittable(f"its configuration can't be read: {error}") from error
        config = json.loads(text)
        _check_repeatable(config)
        try:
            self.cuts = text_cuts(config)
        except (ValueError, KeyError) as error:
            raise NotSplittable(f"its configuration is not understood: {error}") from error
        if self.cuts.tokens is None and self.cuts.words is None:
            raise NotSplittable("it has neither added tokens nor a way to split words that is known")
        # One of its own: vLLM sets a limit of tokens at the other before each text.
        self._backend: Tokenizer = Tokenizer.from_str(text)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._before, self._after = _added_around(tokenizer)
        self._cache = SegmentCache(bytes_max)
        self._try(tokenizer, [token["content"] for token in config["added_tokens"]])

    @property
    def cuts_words(self) -> bool:
        """Whether a text is also cut between its added tokens."""
        return self.cuts.words is not None

    def encode(self, text: str, salt: str, *, add_special_tokens: bool, cuts: list[int] | None = None) -> Encoded:
        """The ids of a text, cut at ``cuts`` or as is usual. What was tokenised under another ``salt`` is not known.

        Raises UnicodeEncodeError where the text has half of a surrogate pair.
        """
        segments = [text[start:end] for start, end in itertools.pairwise([*(cuts or self.cuts.of(text)), len(text)])]
        raw = [segment.encode() for segment in segments]
        key = blake3(salt.encode()).digest()
        names = [blake3(one, key=key).digest() for one in raw]
        known = self._cache.find(names)
        unknown = [at for at, ids in enumerate(known) if ids is None]
        bytes_all = sum(map(len, raw))
        bytes_known = bytes_all - sum(len(raw[at]) for at in unknown)
        computed = self._backend.encode_batch_fast([segments[at] for at in unknown], add_special_tokens=False) if unknown else []
        for at, encoding in zip(unknown, computed, strict=True):
            known[at] = ids = np.array(encoding.ids, dtype=np.uint32)
            self._cache.add(names[at], ids)
        whole: TokenIds = np.concatenate([ids for ids in known if ids is not None])
        ids = whole.tolist()
        return Encoded([*self._before, *ids, *self._after] if add_special_tokens else ids, bytes_known, bytes_all)

    def _try(self, tokenizer: Any, added: list[str]) -> None:
        """Raises NotSplittable where a text comes out otherwise than from the plain tokenizer."""
        for text in _texts_to_try(added):
            for special in (False, True):
                plain = tokenizer(text, add_special_tokens=special)["input_ids"]
                for cuts in (self.cuts.of(text, 1, 1), self.cuts.of(text)):
                    if self.encode(text, "", add_special_tokens=special, cuts=cuts).ids != plain:
                        raise NotSplittable(f"cut it makes other tokens of {text!r}")
        self._cache.clear()


def _backend(tokenizer: Any) -> Tokenizer:
    """What computes the ids of a tokenizer. Raises NotSplittable where that is not the library's own."""
    kind = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not isinstance(tokenizer.backend_tokenizer, Tokenizer):
        raise NotSplittable(f"{kind.__name__} is no tokenizer of the tokenizers library")
    if any(getattr(kind, name, None) is not getattr(PreTrainedTokenizerFast, name, None) for name in ("__call__", "_encode_plus")):
        raise NotSplittable(f"{kind.__name__} has a way of its own to encode")
    if tokenizer.split_special_tokens:
        raise NotSplittable("it splits special tokens")
    return tokenizer.backend_tokenizer


def _check_repeatable(config: dict[str, Any]) -> None:
    model = config["model"]
    if model.get("dropout") or model.get("alpha") or model.get("nbest_size"):
        raise NotSplittable("it draws the way in which it splits words")


def _added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What is added before and after a text's own tokens."""
    bare, whole = (tokenizer("word", add_special_tokens=special)["input_ids"] for special in (False, True))
    for before in range(len(whole) - len(bare) + 1):
        if whole[before : before + len(bare)] == bare:
            return whole[:before], whole[before + len(bare) :]
    raise NotSplittable("what it adds to a text is not before and after it")


def _texts_to_try(added: list[str]) -> Iterator[str]:
    chosen = random.Random(len(added))
    tokens = added if len(added) <= _TRIED_TOKENS else [*added[: _TRIED_TOKENS // 2], *chosen.sample(added, _TRIED_TOKENS // 2)]
    yield from ("", *_TRIED, *tokens)
    for _ in range(_TRIED_TEXTS):
        kinds = chosen.choices((_TRIED, tokens or _TRIED), (2, 1), k=chosen.randint(2, _TRIED_PARTS))
        yield "".join(chosen.choice(kind) for kind in kinds)
