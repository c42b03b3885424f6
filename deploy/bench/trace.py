"""A trace of arrivals with shared prefixes and what a perfect cache would save of it. Pure but for reading.

The format is the one that Mooncake published (Qin et al., FAST '25): a line is ``{"timestamp": ms, "input_length": tokens, "output_length": tokens,
"hash_ids": [...]}``. An id stands for 512 tokens, the last one for the rest; equal ids are equal tokens.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3

from cachebus.errors import SettingsError
from deploy.sim.vocabulary import FIRST_WORD, WORDS

BLOCK_TOKENS = 512


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


@dataclass(frozen=True)
class Arrival:
    """A request of the trace, ``at_seconds`` after its first one."""

    at_seconds: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]

    def prompt(self) -> list[int]:
        """Its token ids, all of them words of the simulated vocabulary."""
        parts = [np.frombuffer(blake3(b"trace block %d" % block).digest(length=BLOCK_TOKENS * 4), np.uint32) % WORDS for block in self.blocks]
        ids: list[int] = (np.concatenate(parts).astype(np.int64)[: self.input_tokens] + FIRST_WORD).tolist()
        return ids


def read_trace(path: Path, requests: int) -> list[Arrival]:
    """The first ``requests`` arrivals of a .jsonl or .jsonl.gz file. Raises SettingsError."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = [msgspec.json.decode(line, type=_Line) for line in raw.splitlines()[:requests]]
    except OSError as error:
        raise SettingsError(f"--trace {path}: {error.strerror or error}") from error
    except msgspec.DecodeError as error:
        raise SettingsError(f"--trace {path}: not a trace of Mooncake's format: {error}") from error
    if not lines or any(len(line.hash_ids) * BLOCK_TOKENS < line.input_length or line.output_length < 1 for line in lines):
        raise SettingsError(f"--trace {path}: not a trace of Mooncake's format: a request has fewer ids than tokens, or there is none")
    return [Arrival((line.timestamp - lines[0].timestamp) / 1e3, line.input_length, line.output_length, tuple(line.hash_ids)) for line in lines]


def ceiling(arrivals: Iterable[Arrival]) -> float:
    """The share of all prompt tokens that came before at the beginning of another prompt: what a cache without limits saves."""
    seen: set[int] = set()
    saved = total = 0
    for arrival in arrivals:
        chain, hit = 0, True
        for place, block in enumerate(arrival.blocks):
            chain = hash((chain, block))
            hit = hit and chain in seen
            saved += min(BLOCK_TOKENS, arrival.input_tokens - place * BLOCK_TOKENS) if hit else 0
            seen.add(chain)
        total += arrival.input_tokens
    return saved / total


def total_tokens(arrivals: Sequence[Arrival]) -> int:
    """Prompt tokens of all arrivals."""
    return sum(arrival.input_tokens for arrival in arrivals)
