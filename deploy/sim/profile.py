"""How long a simulated engine takes for what it does, and how large it is: a profile, read from TOML or JSON. Pure but for reading the file."""

from __future__ import annotations

import tomllib
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cachebus.errors import SettingsError

Curve = tuple[tuple[float, float], ...]
"""Points (x, y) by rising x; in between a straight line, beyond the ends the nearest point's y."""


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine. The defaults are a Llama 3.1 8B in bf16 on an H200.

    Prefill and pulls are fitted to ``benchmarks/h200/hits.json`` (cold 2,048 to 131,072 tokens within 5 to 10%); decode is an assumption.
    """

    model: str = "headstart-sim"
    layers: int = 2
    """Layers of simulated KV: 8 bytes a token each"""
    block_size: int = 16
    """Tokens in a block"""
    blocks: int = 25_000
    """Blocks of KV in the engine's HBM"""
    max_model_len: int = 131_072
    max_num_batched_tokens: int = 8192
    """Tokens in one step"""
    max_num_seqs: int = 256
    """Requests that run at once"""
    kv_bytes_per_token: int = 131_072
    """What a token's KV would weigh; only times depend on it"""
    step_ms: float = 1.0
    """What every step costs"""
    prefill_tokens_per_second: Curve = ((1, 20_000.0), (512, 40_000.0), (2048, 43_500.0))
    """By the prompt tokens in a step"""
    attention_ns_per_pair: float = 0.84
    """For each prompt token and each token before it"""
    decode_ms: Curve = ((1, 7.0), (16, 8.0), (64, 11.0), (256, 24.0))
    """A step's time by the requests that generate in it"""
    decode_ns_per_context_token: float = 33.0
    """For each token that a generating request has behind it"""
    pull_gb_per_second: float = 45.0
    pull_ms: float = 3.0
    """What every pull costs beside its bytes"""
    publish_gb_per_second: float = 45.0
    hand_over_gb_per_second: float = 500.0
    """Out of another engine's blocks on the same GPU, an assumption"""

    def __post_init__(self) -> None:
        for name in ("layers", "block_size", "blocks", "max_model_len", "max_num_batched_tokens", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: give at least 1")
        if self.max_model_len > self.blocks * self.block_size:
            raise ValueError(f"max_model_len: {self.max_model_len} tokens don't fit {self.blocks} blocks of {self.block_size}")
        for name in ("pull_gb_per_second", "publish_gb_per_second", "hand_over_gb_per_second"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: give more than 0")
        for name in ("prefill_tokens_per_second", "decode_ms"):
            points: Curve = getattr(self, name)
            if not points or any(y <= 0 for _, y in points) or [x for x, _ in points] != sorted({x for x, _ in points}):
                raise ValueError(f"{name}: give points [x, y] with rising x, each y more than 0")

    def step_seconds(self, prefill: Sequence[tuple[int, int]], decode_contexts: Sequence[int]) -> float:
        """A step's time. ``prefill``: each prompt's tokens before and in the step; ``decode_contexts``: the tokens behind each other request."""
        tokens = sum(fresh for _, fresh in prefill)
        seconds = self.step_ms / 1e3
        if tokens:
            seconds += tokens / at(self.prefill_tokens_per_second, tokens)
            seconds += sum(before * fresh + fresh * fresh / 2 for before, fresh in prefill) * self.attention_ns_per_pair / 1e9
        if decode_contexts:
            seconds += at(self.decode_ms, len(decode_contexts)) / 1e3 + sum(decode_contexts) * self.decode_ns_per_context_token / 1e9
        return seconds

    def pull_seconds(self, tokens: int) -> float:
        """The time in which ``tokens`` are pulled into HBM."""
        return self.pull_ms / 1e3 + tokens * self.kv_bytes_per_token / (self.pull_gb_per_second * 1e9)

    def hand_over_seconds(self, tokens: int) -> float:
        """The time in which ``tokens`` are copied out of another engine's blocks."""
        return tokens * self.kv_bytes_per_token / (self.hand_over_gb_per_second * 1e9)

    def publish_seconds(self, tokens: int) -> float:
        """The time in which ``tokens`` are copied out."""
        return tokens * self.kv_bytes_per_token / (self.publish_gb_per_second * 1e9)


def at(curve: Curve, x: float) -> float:
    """A curve's value at ``x``."""
    place = bisect_right(curve, x, key=lambda point: point[0])
    if place == 0:
        return curve[0][1]
    if place == len(curve):
        return curve[-1][1]
    (x0, y0), (x1, y1) = curve[place - 1], curve[place]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def read_profile(path: Path | None) -> Profile:
    """The profile in a .toml or .json file; the default where there is none. Raises SettingsError."""
    if path is None:
        return Profile()
    try:
        raw = path.read_bytes()
        return msgspec.json.decode(raw, type=Profile) if path.suffix == ".json" else msgspec.convert(tomllib.loads(raw.decode()), Profile)
    except OSError as error:
        raise SettingsError(f"--profile {path}: can't be read: {error.strerror}") from error
    except (msgspec.ValidationError, msgspec.DecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"--profile {path}: {error}") from error
