"""What a dense decoder's shape decides: its weights, its KV and what a token costs to compute. Pure but for reading a ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from cachebus.errors import SettingsError

_NOT_DENSE = {
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "kv_lora_rank": "latent attention",
}


@dataclass(frozen=True)
class Shape:
    """A model. ``hidden``, ``inner`` and ``head`` are widths; ``weight_bytes`` and ``kv_bytes`` are those of one element (1: fp8, 2: bf16)."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool = False
    weight_bytes: int = 2
    kv_bytes: int = 2
    tokens_max: int = 131_072

    @property
    def linear_parameters(self) -> int:
        """Parameters that every token is multiplied with: attention's projections and the three of a gated MLP, in all layers."""
        attention = self.hidden * self.head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def parameters(self) -> int:
        """All but the norms, which are too few to count."""
        return self.linear_parameters + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def weights(self) -> int:
        """Bytes of the weights; embeddings and the head stay in bf16."""
        return self.linear_parameters * self.weight_bytes + (self.parameters - self.linear_parameters) * 2

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a token's KV in all layers."""
        return self.layers * 2 * self.kv_heads * self.head * self.kv_bytes

    def linear_flops(self, tokens: float) -> float:
        """Of the projections and MLPs, for so many tokens."""
        return 2.0 * self.linear_parameters * tokens

    def attention_flops(self, before: float, fresh: float) -> float:
        """Of attention for ``fresh`` tokens behind ``before`` others: two products of the heads' width for each pair of tokens."""
        return 4.0 * self.layers * self.heads * self.head * (before * fresh + fresh * fresh / 2)


NAMED = {
    shape.name: shape
    for shape in (
        Shape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128_256, tied=True),
        Shape("llama-3.2-3b", 28, 3072, 8192, 24, 8, 128, 128_256, tied=True),
        Shape("llama-3.1-8b", 32, 4096, 14_336, 32, 8, 128, 128_256),
        Shape("llama-3.1-70b", 80, 8192, 28_672, 64, 8, 128, 128_256),
        Shape("llama-3.1-405b", 126, 16_384, 53_248, 128, 8, 128, 128_256),
        Shape("qwen3-8b", 36, 4096, 12_288, 32, 8, 128, 151_936, tokens_max=40_960),
        Shape("qwen3-32b", 64, 5120, 25_600, 64, 8, 128, 151_936, tokens_max=40_960),
    )
}
"""Shapes as their ``config.json`` has them, in bf16."""


def shape_of(name: str, weight_bytes: int, kv_bytes: int) -> Shape:
    """The model of that name, or the one whose folder or ``config.json`` it is. Raises SettingsError."""
    found = NAMED.get(name.lower()) or read_shape(Path(name))
    return replace(found, weight_bytes=weight_bytes, kv_bytes=kv_bytes)


def read_shape(path: Path) -> Shape:
    """The shape in a folder's ``config.json``, or in that file. Raises SettingsError where it is none, or the model is not a dense decoder."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise SettingsError(f"--model {path}: none of {', '.join(NAMED)}, and no config.json can be read there: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise SettingsError(f"--model {file}: {error}") from error
    for key, what in _NOT_DENSE.items():
        if config.get(key):
            raise SettingsError(f"--model {file}: {key} says that it is {what}; only dense decoders can be planned")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise SettingsError(f"--model {file}: sliding_window: only models whose layers all attend to the whole context can be planned")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        shape = Shape(
            name=file.parent.name or str(file),
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            inner=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            tokens_max=int(config.get("max_position_embeddings", Shape.tokens_max)),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise SettingsError(f"--model {file}: no shape of a decoder: {type(error).__name__} {error}") from error
    if min(shape.layers, shape.hidden, shape.inner, shape.heads, shape.kv_heads, shape.head, shape.vocabulary, shape.tokens_max) < 1:
        raise SettingsError(f"--model {file}: no shape of a decoder: a size is below 1")
    return shape
