"""Everything that a plan rests on, and where it is from. Pure."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deploy.plan import rates as constants
from deploy.plan.gpus import Gpu
from deploy.plan.options import DEFAULTS
from deploy.plan.plan import Wanted
from deploy.plan.pools import Objective
from deploy.plan.service import ROUTER_SECONDS

Origin = Literal["given", "measured", "rule"]
_ORDER: tuple[Origin, ...] = ("given", "measured", "rule")


@dataclass(frozen=True)
class Assumption:
    """One figure or way of reckoning. ``measured``: by this project, ``why`` says where; ``rule``: nobody measured it for this plan."""

    what: str
    value: str
    origin: Origin
    why: str = ""


_ALWAYS = (
    Assumption("router", f"{ROUTER_SECONDS * 1e3:g} ms a request", "measured", "benchmarks/epyc-2-cores/router.json"),
    Assumption("vLLM's own cache in HBM", "not counted, on either side", "rule", "what it hits comes on top"),
    Assumption("other nodes' DRAM and NVMe", "not counted", "rule", "each node has its own hits; a cold prompt's two workers share a node"),
    Assumption("waiting", "a queue a pool: Erlang C, Allen-Cunneen", "rule", "prompts one after the other; an exponential tail"),
    Assumption("routes", "by router.prefill_tokens_min", "rule", "router.policy: cost also computes on idle decode workers"),
    Assumption("tiers", "LRU; what is stored is in all of them", "rule", "cache.eviction: lru"),
    Assumption("workers that fail, hours busier than --rate", "not counted", "rule", "spares come on top"),
)


def assumptions(options: argparse.Namespace, gpu: Gpu, wanted: Wanted, objective: Objective) -> list[Assumption]:
    """All that this plan rests on, what was given first. ``objective``: as it was planned with."""
    found = [*_traffic(options, wanted), *_engine(options, gpu, wanted), *_prices(options, gpu, wanted), _objective(options, objective), *_ALWAYS]
    return sorted(found, key=lambda one: _ORDER.index(one.origin))


def _traffic(options: argparse.Namespace, wanted: Wanted) -> list[Assumption]:
    traffic = wanted.traffic
    rate = f"{traffic.rate:g} requests a second"
    arrivals = Assumption("gaps between requests", f"squared variation {traffic.burstiness:g}", _origin(options, "burstiness"), "1: Poisson")
    if options.trace:
        return [Assumption("traffic", f"{options.trace}, {rate}", "given", "its reuse is replayed"), arrivals]
    prefix = options.prefix_tokens or options.prompt_tokens
    popularity = f"{options.prefixes:,} of {prefix:,} tokens, Zipf {options.zipf:g}"
    return [
        Assumption("traffic", f"{rate}, prompts of {options.prompt_tokens:,} tokens", "given"),
        Assumption("answers", f"{options.output_tokens:,} tokens", _origin(options, "output_tokens")),
        Assumption("reuse", f"{options.reuse:.0%} of the requests", _origin(options, "reuse")),
        Assumption("known prefixes", popularity, _origin(options, "prefixes"), "Che's approximation of LRU"),
        arrivals,
    ]


def _engine(options: argparse.Namespace, gpu: Gpu, wanted: Wanted) -> list[Assumption]:
    rates = wanted.rates
    sizes = f"{rates.kv_bytes_per_token / 1024:g} KiB of KV a token, room for {rates.room_tokens:,} tokens a worker"
    if options.profile:
        return [Assumption("engine", str(options.profile), "given", sizes)]
    here: Origin = "measured" if gpu.name == "h200" and options.tp == 1 else "rule"
    step = f"{constants.BANDWIDTH_UTILISATION:.0%} of HBM's bandwidth, {constants.STEP_SECONDS_PER_LAYER * 1e6:g} us a layer"
    room = f"{constants.MEMORY_UTILISATION:.0%} of HBM, without {constants.ACTIVATION_BYTES / 1e9:g} GB"
    found = [
        Assumption("model", f"{options.model}, weights {options.weights}, KV {options.kv}", _origin(options, "model"), sizes),
        Assumption("worker", f"{options.tp} x {gpu.name}", _origin(options, "gpu"), "its maker's figures"),
        *_prompts(options, here),
        Assumption(
            "hand-over to decode",
            f"{float(rates.handover(np.ones(1))[0]) * 1e3:.0f} ms",
            here,
            "benchmarks/h200/handover.json, by the model's layers",
        ),
        Assumption("a decode step", step, "rule", "near what headstart sim takes for 8B on H200"),
        Assumption("room for KV", room, "rule", "vLLM's default; the rest for activations"),
    ]
    if options.tp > 1:
        found.append(Assumption("tensor parallelism", f"{constants.TENSOR_PARALLEL_UTILISATION:.0%} of each GPU", "rule"))
    return found


def _prompts(options: argparse.Namespace, here: Origin) -> list[Assumption]:
    if options.measured:
        return [Assumption("cold prompts and hits", str(options.measured), "given", "at other lengths as computed, stretched alike")]
    cold = f"{constants.COMPUTE_UTILISATION:.0%} of the dense peak"
    hit = f"{constants.LINK_UTILISATION:.0%} of PCIe, {constants.HIT_SECONDS_PER_LAYER * 1e3:g} ms a layer"
    return [
        Assumption("a cold prompt", f"{options.cold_seconds:g} s", "given")
        if options.cold_seconds
        else Assumption("a cold prompt", cold, here, "8B and 70B on H200, within 12%"),
        Assumption("a hit from DRAM", f"{options.hit_seconds:g} s", "given")
        if options.hit_seconds
        else Assumption("a hit from DRAM", hit, here, "benchmarks/h200/hits.json, within 9%"),
    ]


def _prices(options: argparse.Namespace, gpu: Gpu, wanted: Wanted) -> list[Assumption]:
    price: Origin = "given" if options.gpu_price else "rule"
    found = [Assumption("GPU price", f"${wanted.gpu_price:g} an hour", price, "" if options.gpu_price else "a mark of the order only: give yours")]
    for tier in wanted.tiers:
        speed = f", reads {tier.bandwidth / 1e9:g} GB/s" if tier.bandwidth else ""
        value = f"at most {tier.gigabytes_max:,.0f} GB {'in all' if tier.shared else 'a node'}{speed}, ${tier.price:g} a GB and hour"
        names = [f"{tier.name}_gb", f"{tier.name}_price", *([f"{tier.name}_speed"] if tier.bandwidth else [])]
        given = all(_origin(options, name) == "given" for name in names)
        found.append(Assumption(tier.name, value, "given" if given else "rule"))
    return [*found, Assumption("node", f"{wanted.gpus_per_node} GPUs, paid one by one", _origin(options, "gpus_per_node"))]


def _objective(options: argparse.Namespace, objective: Objective) -> Assumption:
    limits = [(name, value) for name, value in (("mean", objective.ttft_mean), ("p99", objective.ttft_p99)) if math.isfinite(value)]
    first = ", ".join(f"{name} {value:.3g} s" for name, value in limits)
    given = math.isfinite(options.ttft_mean) or math.isfinite(options.ttft_p99)
    why = "" if given else "twice what it is without waiting and without a cache"
    return Assumption("objective", f"first token {first}; tokens {objective.token_seconds * 1e3:g} ms apart", "given" if given else "rule", why)


def _origin(options: argparse.Namespace, name: str) -> Origin:
    return "rule" if getattr(options, name) == DEFAULTS[name] else "given"
