"""The command ``headstart plan``: from arguments to a plan, and onto the screen."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec
import numpy as np

from cachebus.errors import SettingsError
from deploy.bench.trace import read_trace
from deploy.plan import show
from deploy.plan.assumptions import assumptions
from deploy.plan.gpus import GPUS, Gpu
from deploy.plan.plan import Wanted, plan
from deploy.plan.pools import Objective
from deploy.plan.rates import Corrected, Modelled, Points, Profiled, Rates
from deploy.plan.shape import shape_of
from deploy.plan.tiers import Tier
from deploy.plan.traffic import Shared, Traced
from deploy.sim.profile import read_profile

_REQUESTS_MAX = 1 << 20
_BYTES = {"bf16": 2, "fp8": 1}
_GIGA = 1e9
_ANSWER_BEYOND = 1024
"""Tokens by which an answer may go beyond the model's length: who plans for prompts of all of it cuts them by an answer later."""


class _Row(msgspec.Struct):
    system: str
    case: str
    tokens: int
    metric: str
    median: float


class _Rows(msgspec.Struct):
    rows: list[_Row]


def run(options: argparse.Namespace) -> int:
    """0 where the cache pays, 1 where it does not. Raises HeadstartError."""
    gpu = GPUS.get(options.gpu.lower())
    if gpu is None:
        raise SettingsError(f"--gpu {options.gpu}: none of {', '.join(sorted(GPUS))}")
    traffic = traffic_of(options)
    rates = rates_of(options, gpu, traffic)
    if traffic.total_max > rates.room_tokens:
        raise SettingsError(_too_small(options, rates, traffic))
    wanted = Wanted(
        traffic=traffic,
        rates=rates,
        gpu_price=options.gpu_price or gpu.price,
        gpus_per_node=options.gpus_per_node,
        tiers=(
            Tier("dram", options.dram_gb, options.dram_price),
            Tier("nvme", options.nvme_gb, options.nvme_price, options.nvme_speed * _GIGA),
            Tier("redis", options.redis_gb, options.redis_price, options.redis_speed * _GIGA, shared=True),
        ),
        objective=Objective(options.ttft_mean, options.ttft_p99, options.itl_ms / 1e3),
        prefill_tokens_min=options.prefill_tokens_min,
    )
    found = plan(wanted)
    rests_on = assumptions(options, gpu, wanted, found.objective)
    print(json.dumps(show.document(found, rests_on)) if options.json else show.table(found, rests_on))
    return 0 if found.pays else 1


def traffic_of(options: argparse.Namespace) -> Shared | Traced:
    """What comes, described or from the trace. Raises SettingsError."""
    if options.trace:
        if options.prompt_tokens or options.prefix_tokens or options.reuse:
            raise SettingsError("--trace has lengths and reuse: leave --prompt-tokens, --prefix-tokens and --reuse out")
        arrivals = read_trace(options.trace, options.requests or _REQUESTS_MAX)
        if options.rate is None and arrivals[-1].at_seconds <= 0:
            raise SettingsError(f"--trace {options.trace}: all requests come at once: give --rate")
        return Traced(arrivals, options.rate, options.burstiness)
    if options.rate is None or options.prompt_tokens is None:
        raise SettingsError("give --rate and --prompt-tokens, or --trace")
    prefix = options.prefix_tokens or options.prompt_tokens
    if prefix > options.prompt_tokens:
        raise SettingsError(f"--prefix-tokens {prefix}: more than a prompt has ({options.prompt_tokens})")
    return Shared(
        rate=options.rate,
        prompt=options.prompt_tokens,
        output=options.output_tokens,
        reuse=options.reuse,
        prefixes=options.prefixes,
        prefix=prefix,
        zipf=options.zipf,
        burstiness=options.burstiness,
    )


def rates_of(options: argparse.Namespace, gpu: Gpu, traffic: Shared | Traced) -> Rates:
    """The engine. Raises SettingsError."""
    own = options.cold_seconds is not None or options.hit_seconds is not None
    if sum((own, options.measured is not None, options.profile is not None)) > 1:
        raise SettingsError("--cold-seconds and --hit-seconds, --measured, --profile: give one of these three")
    if options.profile:
        return Profiled(read_profile(options.profile), options.tp)
    shape = shape_of(options.model, _BYTES[options.weights], _BYTES[options.kv])
    if shape.heads % options.tp:
        raise SettingsError(f"--tp {options.tp}: {shape.name} has {shape.heads} heads, which can't be divided by that")
    if traffic.total_max > shape.tokens_max + _ANSWER_BEYOND:
        raise SettingsError(f"{traffic.total_max:,} tokens of prompt and answer: {shape.name} takes {shape.tokens_max:,}")
    modelled = Modelled(shape, gpu, options.tp)
    if options.measured:
        return Corrected(modelled, *_measured(options.measured))
    if not own:
        return modelled
    if not isinstance(traffic, Shared):
        raise SettingsError("--cold-seconds and --hit-seconds are for prompts of one length: with --trace give --measured")
    with_cold = Corrected(modelled, [(traffic.prompt, options.cold_seconds)] if options.cold_seconds else ())
    if options.hit_seconds is None:
        return with_cold
    rest = float(with_cold.compute(np.array([float(traffic.prefix)]), np.array([float(traffic.prompt - traffic.prefix)]))[0])
    if options.hit_seconds <= rest:
        raise SettingsError(f"--hit-seconds {options.hit_seconds:g}: computing the {traffic.prompt - traffic.prefix} other tokens takes {rest:.3g} s")
    return Corrected(with_cold, hit=[(traffic.prefix, options.hit_seconds - rest)])


def _measured(path: Path) -> tuple[Points, Points]:
    """Cold and DRAM times by length of our own rows. Raises SettingsError."""
    try:
        rows = msgspec.json.decode(path.read_bytes(), type=_Rows).rows
    except OSError as error:
        raise SettingsError(f"--measured {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise SettingsError(f"--measured {path}: not what a benchmark writes: {error}") from error
    ours = [row for row in rows if row.system == "headstart" and row.metric == "ttft_seconds"]
    cold, hit = (sorted((row.tokens, row.median) for row in ours if row.case == case) for case in ("cold", "dram"))
    if not cold or not hit:
        raise SettingsError(f"--measured {path}: no times to first token of headstart's cold prompts and of its hits from dram")
    return cold, hit


def _too_small(options: argparse.Namespace, rates: Rates, traffic: Shared | Traced) -> str:
    if options.profile:
        return f"--profile {options.profile}: room for {rates.room_tokens:,} tokens, a request needs {traffic.total_max:,}"
    shape, gpu = shape_of(options.model, _BYTES[options.weights], _BYTES[options.kv]), GPUS[options.gpu.lower()]
    fits = [tp for tp in (1, 2, 4, 8, 16) if shape.heads % tp == 0 and Modelled(shape, gpu, tp).room_tokens >= traffic.total_max]
    advice = f"give --tp {fits[0]}" + (" or --weights fp8" if options.weights == "bf16" else "") if fits else "take a larger GPU"
    needs = (
        f"{shape.weights / _GIGA:.1f} GB of weights and {traffic.total_max * rates.kv_bytes_per_token / _GIGA:.1f} GB of KV for the longest request"
    )
    usable = f"{options.tp} x {gpu.name} with {gpu.memory / _GIGA:.0f} GB each"
    return f"{shape.name} does not fit a worker: {needs} on {usable}; {advice}"
