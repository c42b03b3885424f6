"""Prompts of a wanted length in tokens, as text."""

from __future__ import annotations

import random
import sys
from typing import Any

from transformers import AutoTokenizer

from cachebus.settings import ModelSettings


class Prompts:
    """Random text, cut by the model's own tokenizer. The same seed gives the same text."""

    def __init__(self, model: ModelSettings, seed: int = 0) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model.name, revision=model.revision or None)
        # The text is cut to length afterwards: no warning is due when it is longer than the model first.
        self._tokenizer.model_max_length = sys.maxsize
        self._random = random.Random(seed)

    def text(self, tokens: int) -> str:
        """Text of ``tokens`` tokens; tokenizers that merge across the cut may be one or two off."""
        # A noun and a number are at least two tokens of any tokenizer.
        words = [f"{self._random.choice(_NOUNS)} {self._random.randrange(10_000)}" for _ in range(tokens // 2 + 1)]
        return str(self._tokenizer.decode(self.token_ids(" ".join(words))[:tokens]))

    def token_ids(self, text: str) -> list[int]:
        """The text's token ids."""
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def system_for(self, total_tokens: int, question: str) -> str:
        """A system prompt that makes a chat of it and ``question`` ``total_tokens`` long."""
        template = self._chat_tokens([{"role": "system", "content": ""}, {"role": "user", "content": question}])
        return self.text(total_tokens - template)

    def _chat_tokens(self, messages: list[dict[str, Any]]) -> int:
        rendered = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return len(self.token_ids(rendered))


_NOUNS = ("invoice", "river", "engine", "valley", "ledger", "copper", "window", "harbour", "meadow", "signal", "orchard", "granite")
