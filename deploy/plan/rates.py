"""How long an engine takes for what it does, and how much KV it has room for. Pure.

Three sources: computed from a model's shape and a GPU's figures, corrected by what was measured or given, or a simulated engine's profile.
Times are seconds; arrays hold one figure for each kind of request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from deploy.plan.figures import Floats
from deploy.plan.gpus import Gpu
from deploy.plan.shape import Shape
from deploy.sim.profile import Profile

Points = Sequence[tuple[int, float]]
"""Prompt lengths in tokens, rising, each with the seconds that were measured there."""

COMPUTE_UTILISATION = 0.62
"""Of the dense peak, in prefill. Fitted to cold prompts of 2,048 to 131,072 tokens on an H200: 8B in bf16 (``benchmarks/h200/hits.json``) and
70B in fp8."""
PASS_SECONDS_PER_LAYER = 0.0005
"""A forward pass takes at least so long for each layer: 14 to 18 ms for 32 layers without CUDA graphs, on an H200."""
HIT_SECONDS_PER_LAYER = 0.0008
LINK_UTILISATION = 0.78
"""A hit beside its bytes, and the share of PCIe that the bytes get: fitted to hits from DRAM of 2,048 to 131,072 tokens
(``benchmarks/h200/hits.json``)."""
HANDOVER_SECONDS_PER_LAYER = 0.0013
"""From the end of prefill to the first token at a decode worker that followed: 42 ms at 2,048 and 8,192 tokens for 32 layers
(``benchmarks/h200/handover.json``)."""
BANDWIDTH_UTILISATION = 0.7
STEP_SECONDS_PER_LAYER = 0.00006
"""Of a decode step: the share of the memory's bandwidth, and what it takes beside that with CUDA graphs. A rule, not measured."""
TENSOR_PARALLEL_UTILISATION = 0.9
"""What is left of each GPU where several work on one layer. A rule, not measured."""
MEMORY_UTILISATION, ACTIVATION_BYTES = 0.9, 3e9
"""vLLM's gpu_memory_utilization, and what a GPU needs of that beside weights and KV. A rule."""
SEQUENCES_MAX = 256
"""vLLM's max_num_seqs: requests that run at once."""


class Rates(Protocol):
    """An engine."""

    @property
    def gpus(self) -> int:
        """GPUs of a worker."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that a token's KV takes in a tier."""

    @property
    def room_tokens(self) -> int:
        """Tokens whose KV fits a worker's HBM; below 1 where not even the weights do."""

    @property
    def sequences_max(self) -> int:
        """Requests that run at once."""

    def handover(self, tokens: Floats) -> Floats:
        """From the end of prefill to the first token at an idle decode worker that followed the computation of so many tokens."""

    def cold(self, tokens: Floats) -> Floats:
        """A prompt of which nothing is known."""

    def compute(self, before: Floats, fresh: Floats) -> Floats:
        """``fresh`` tokens behind ``before`` that are there, beside what a hit takes anyway."""

    def hit(self, tokens: Floats) -> Floats:
        """A prompt whose first ``tokens`` are pulled from the node's DRAM, up to its first answer token."""

    def step(self, batch: float, context: float) -> float:
        """One token of each of ``batch`` requests that have ``context`` tokens behind them on average."""


@dataclass(frozen=True)
class Modelled:
    """A shape on ``gpus`` GPUs of a kind, by tensor parallelism."""

    shape: Shape
    gpu: Gpu
    gpus: int = 1

    @property
    def kv_bytes_per_token(self) -> int:
        # More ranks than KV heads: each head's KV is there several times.
        return self.shape.kv_bytes_per_token * max(1, self.gpus // self.shape.kv_heads)

    @property
    def room_tokens(self) -> int:
        free = self.gpus * (self.gpu.memory * MEMORY_UTILISATION - ACTIVATION_BYTES) - self.shape.weights
        return int(free // self.kv_bytes_per_token)

    @property
    def sequences_max(self) -> int:
        return SEQUENCES_MAX

    def cold(self, tokens: Floats) -> Floats:
        return np.maximum(self.compute(np.zeros_like(tokens), tokens), PASS_SECONDS_PER_LAYER * self.shape.layers)

    def compute(self, before: Floats, fresh: Floats) -> Floats:
        linear = fresh * self.shape.linear_flops(1.0) / self._peak
        # Attention is computed in bf16 whatever the weights are in.
        attention = self.shape.attention_flops(0.0, 1.0) * 2 * (before * fresh + fresh * fresh / 2) / self.gpu.bf16
        return (linear + attention) / (COMPUTE_UTILISATION * self._parallel)

    def handover(self, tokens: Floats) -> Floats:
        return np.full_like(tokens, HANDOVER_SECONDS_PER_LAYER * self.shape.layers)

    def hit(self, tokens: Floats) -> Floats:
        moved = tokens * self.kv_bytes_per_token / (self.gpu.link * LINK_UTILISATION * self.gpus)
        return HIT_SECONDS_PER_LAYER * self.shape.layers + moved

    def step(self, batch: float, context: float) -> float:
        read = self.shape.weights + batch * context * self.kv_bytes_per_token
        computed = batch * self.shape.linear_flops(1.0) / (self._peak * COMPUTE_UTILISATION * self._parallel)
        return STEP_SECONDS_PER_LAYER * self.shape.layers + read / (self.gpu.bandwidth * BANDWIDTH_UTILISATION * self._parallel) + computed

    @property
    def _peak(self) -> float:
        return self.gpu.fp8 if self.shape.weight_bytes == 1 else self.gpu.bf16

    @property
    def _parallel(self) -> float:
        return self.gpus * (TENSOR_PARALLEL_UTILISATION if self.gpus > 1 else 1.0)


class Corrected:
    """Other rates, stretched so that cold prompts and hits take what was measured or given; between two lengths the factor goes in steps of log2."""

    def __init__(self, rates: Rates, cold: Points = (), hit: Points = ()) -> None:
        self._rates = rates
        self.gpus, self.kv_bytes_per_token, self.room_tokens = rates.gpus, rates.kv_bytes_per_token, rates.room_tokens
        self.sequences_max = rates.sequences_max
        self._cold = _factors(cold, [float(rates.cold(np.array([float(n)]))[0]) for n, _ in cold])
        self._hit = _factors(hit, [float(rates.hit(np.array([float(n)]))[0]) for n, _ in hit])

    def cold(self, tokens: Floats) -> Floats:
        return self._rates.cold(tokens) * _at(self._cold, tokens)

    def compute(self, before: Floats, fresh: Floats) -> Floats:
        return self._rates.compute(before, fresh) * _at(self._cold, before + fresh)

    def hit(self, tokens: Floats) -> Floats:
        return self._rates.hit(tokens) * _at(self._hit, tokens)

    def handover(self, tokens: Floats) -> Floats:
        return self._rates.handover(tokens)

    def step(self, batch: float, context: float) -> float:
        return self._rates.step(batch, context)


@dataclass(frozen=True)
class Profiled:
    """A simulated engine, as ``headstart sim --profile`` takes it; one GPU a worker unless told otherwise."""

    profile: Profile
    gpus: int = 1

    @property
    def kv_bytes_per_token(self) -> int:
        return self.profile.kv_bytes_per_token

    @property
    def room_tokens(self) -> int:
        return self.profile.blocks * self.profile.block_size

    @property
    def sequences_max(self) -> int:
        return self.profile.max_num_seqs

    def cold(self, tokens: Floats) -> Floats:
        return self.compute(np.zeros_like(tokens), tokens)

    def compute(self, before: Floats, fresh: Floats) -> Floats:
        pairs, place = np.unique(np.stack([before, fresh]), axis=1, return_inverse=True)
        seconds = np.array([self._in_steps(int(first), int(count)) for first, count in pairs.T])
        return np.asarray(seconds[place.ravel()], np.float64)

    def handover(self, tokens: Floats) -> Floats:
        # What the last step computed is published and pulled when the others are there.
        last = np.minimum(tokens, self.profile.max_num_batched_tokens)
        return self.hit(last) + last * self.profile.kv_bytes_per_token / (self.profile.publish_gb_per_second * 1e9)

    def hit(self, tokens: Floats) -> Floats:
        profile = self.profile
        return profile.pull_ms / 1e3 + tokens * profile.kv_bytes_per_token / (profile.pull_gb_per_second * 1e9) + self._pass

    def step(self, batch: float, context: float) -> float:
        whole = max(1, round(batch))
        return self.profile.step_seconds([], [round(context)] * whole)

    @property
    def _pass(self) -> float:
        return self.profile.step_seconds([(0, 1)], [])

    def _in_steps(self, before: int, fresh: int) -> float:
        seconds, most = 0.0, self.profile.max_num_batched_tokens
        while fresh > 0:
            seconds += self.profile.step_seconds([(before, min(fresh, most))], [])
            before, fresh = before + most, fresh - most
        return seconds


def _factors(points: Points, modelled: Sequence[float]) -> tuple[Floats, Floats]:
    lengths = np.log2([float(tokens) for tokens, _ in points] or [1.0])
    return lengths, np.array([seconds / own for (_, seconds), own in zip(points, modelled, strict=True)] or [1.0])


def _at(factors: tuple[Floats, Floats], tokens: Floats) -> Floats:
    return np.asarray(np.interp(np.log2(np.maximum(tokens, 1.0)), *factors), np.float64)
