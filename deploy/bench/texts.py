"""Prompts of an exact length in tokens, as text."""

from __future__ import annotations

import random
from collections.abc import Callable

from transformers import AutoTokenizer

from cachebus.errors import HeadstartError
from cachebus.settings import ModelSettings

_TRIES_MAX = 20
_NOUNS = ("invoice", "river", "engine", "valley", "ledger", "copper", "window", "harbour", "meadow", "signal", "orchard", "granite")

Count = Callable[[str], int]
"""How many tokens a text has, with those that the engine puts around a prompt."""


def counter(model: ModelSettings) -> Count:
    """The engine's count, by the model's own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model.name, revision=model.revision or None)
    # The engine refuses prompts that are too long; until then the tokenizer need not warn.
    tokenizer.model_max_length = 1 << 30
    return lambda text: len(tokenizer.encode(text))


def exact_text(tokens: int, count: Count, seed: str) -> str:
    """Random text of exactly ``tokens`` tokens, the same for the same seed. Raises HeadstartError where none is found."""
    generator = random.Random(seed)
    for _ in range(_TRIES_MAX):
        text = ""
        while (missing := tokens - count(text)) > 0:
            text += " ".join(f"{generator.choice(_NOUNS)} {generator.randrange(10_000)}" for _ in range(missing // 16 + 1)) + " "
        text = _cut(text, tokens, count)
        if count(text) == tokens:
            return text
    raise HeadstartError(f"found no text of exactly {tokens} tokens for this model's tokenizer")


def _cut(text: str, tokens: int, count: Count) -> str:
    """The longest beginning of at most ``tokens`` tokens, where more characters never make fewer tokens."""
    fits, too_long = 0, len(text) + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if count(text[:middle]) <= tokens:
            fits = middle
        else:
            too_long = middle
    return text[:fits]
