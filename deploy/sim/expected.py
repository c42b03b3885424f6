"""What a simulated model answers, from a prompt's ids alone: the oracle that workers' answers are held against.

It knows neither blocks nor caches, and shares no code with ``deploy.sim.model`` but the vocabulary's size: a token at a time, in plain integers.
"""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

from deploy.sim.vocabulary import FIRST_WORD, WORDS

_MASK = (1 << 64) - 1


def expected_tokens(model: str, layers: int, prompt: Sequence[int], count: int) -> list[int]:
    """The ``count`` ids that follow ``prompt`` where every layer's KV is as it should be."""
    constants = [blake3(f"{model} layer {layer}".encode()).digest() for layer in range(layers)]
    factors = [int.from_bytes(constant[:8], "little") | 1 for constant in constants]
    chain = [int.from_bytes(constant[8:16], "little") for constant in constants]
    read = blake3()
    answer: list[int] = []
    fresh: Sequence[int] = prompt
    while len(answer) < count:
        for token in fresh:
            chain = [(value * factor + token + 1) & _MASK for value, factor in zip(chain, factors, strict=True)]
            read.update(b"".join(value.to_bytes(8, "little") for value in chain))
        answer.append(FIRST_WORD + int.from_bytes(read.digest()[:8], "little") % WORDS)
        fresh = answer[-1:]
    return answer
