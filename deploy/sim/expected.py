"""What a simulated model answers, from a prompt's ids alone: the oracle that workers' answers are held against.

It knows neither blocks nor caches, and shares no code with ``deploy.sim.model`` but the vocabulary's size: a token at a time, in plain integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from blake3 import blake3

from deploy.sim.vocabulary import FIRST_WORD, WORDS

_MASK = (1 << 64) - 1


class Reading:
    """A prompt as far as it was read. ``copy`` it to read on in several ways: a prefix that many prompts share is read once."""

    def __init__(self, model: str, layers: int) -> None:
        constants = [blake3(f"{model} layer {layer}".encode()).digest() for layer in range(layers)]
        self._factors = [int.from_bytes(constant[:8], "little") | 1 for constant in constants]
        self._chain = [int.from_bytes(constant[8:16], "little") for constant in constants]
        self._read = blake3()

    def copy(self) -> Self:
        """Another one at the same place."""
        found = object.__new__(type(self))
        found._factors, found._chain, found._read = self._factors, self._chain, self._read.copy()
        return found

    def read(self, tokens: Sequence[int]) -> None:
        """The next tokens."""
        for token in tokens:
            self._chain = [(value * factor + token + 1) & _MASK for value, factor in zip(self._chain, self._factors, strict=True)]
            self._read.update(b"".join([value.to_bytes(8, "little") for value in self._chain]))

    def next_token(self) -> int:
        """The id that follows where every layer's KV is as it should be."""
        return FIRST_WORD + int.from_bytes(self._read.digest()[:8], "little") % WORDS

    def answer(self, count: int) -> list[int]:
        """The ``count`` ids that follow; all but the last are read then."""
        found: list[int] = []
        while len(found) < count:
            self.read(found[-1:])
            found.append(self.next_token())
        return found


def expected_tokens(model: str, layers: int, prompt: Sequence[int], count: int) -> list[int]:
    """The ``count`` ids that follow ``prompt``."""
    reading = Reading(model, layers)
    reading.read(prompt)
    return reading.answer(count)
