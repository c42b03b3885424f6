"""A plan for people and for programs. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from deploy.plan import cost
from deploy.plan.assumptions import Assumption
from deploy.plan.first_token import FirstToken
from deploy.plan.plan import Plan, Side
from deploy.plan.tiers import Chosen

_NONE = "-"


def document(plan: Plan, assumptions: Sequence[Assumption]) -> dict[str, Any]:
    """Everything, unrounded; what has no bound, or is not there, is null."""
    found = {
        "pays": plan.pays,
        "verdict": plan.verdict,
        "hit_share": plan.hit_share,
        "objective": asdict(plan.objective),
        "tiers": [
            {"tier": one.tier.name, "gigabytes": one.gigabytes, "hit_share": one.hit_share, "busy_share": one.busy, "why": one.why}
            for one in plan.tiers
        ],
        "without_cache": _side(plan.without),
        "with_cache": _side(plan.with_cache),
        "unreachable": plan.unreachable,
        "dollars_per_1000_prompts": dict(zip(("without_cache", "with_cache"), plan.thousand_prompts, strict=True)),
        "assumptions": [asdict(one) for one in assumptions],
    }
    finite: dict[str, Any] = _finite(found)
    return finite


def table(plan: Plan, assumptions: Sequence[Assumption]) -> str:
    """In plain text, the verdict first."""
    lines = [f"The cache {plan.verdict}.", *([f"One side can't be planned: {plan.unreachable}."] if plan.unreachable else []), ""]
    both = zip(_NAMES, _cells(plan.without), _cells(plan.with_cache), strict=True)
    alone = tuple(cost.shown(dollars) for dollars in plan.thousand_prompts)
    lines += _aligned([("", "without cache", "with cache"), *both, (f"{cost.REQUESTS:,} prompts alone", *alone)])
    lines += ["", *_aligned([("tier", "size", "hit share", "reads", "setting", ""), *(_tier(one) for one in plan.tiers)])]
    lines += ["", *_aligned([("assumed", "", "origin", ""), *((one.what, one.value, one.origin, one.why) for one in assumptions)])]
    return "\n".join(lines)


_NAMES = (
    "prefill workers",
    "decode workers",
    "  generating on each",
    "  KV in HBM, at most",
    "  time between tokens",
    "first token, all: mean, p99",
    "first token, cold",
    "first token, hits",
    "  one prefill worker less",
    "GPUs, nodes",
    "an hour: GPUs + tiers",
    "a million tokens",
)

_SETTINGS = {"dram": "cache.max_local_cpu_size", "nvme": "cache.max_local_disk_size", "redis": "cache.remote_url"}
"""Where the size, or the place, of a tier is set."""


def _cells(side: Side | None) -> list[str]:
    if side is None:
        return [_NONE] * len(_NAMES)
    pools, decode = side.pools, side.pools.decode
    return [
        f"{pools.prefill.servers}, {pools.prefill.utilisation:.0%} busy" if pools.prefill.servers else "0",
        f"{decode.workers}, bound by {decode.bound_by}" if decode.workers > 1 else "1",
        f"{decode.batch:.1f} requests",
        f"{decode.room_share:.0%}",
        f"{decode.token_seconds * 1e3:.1f} ms",
        *(_times(one) for one in (pools.every, pools.cold, pools.hit)),
        _times(side.one_less) if pools.prefill.servers else _NONE,
        f"{side.gpus}, {side.nodes}",
        f"{cost.shown(side.gpu_dollars)} + {cost.shown(side.tier_dollars)}",
        cost.shown(side.million_tokens, 4),
    ]


def _times(found: FirstToken) -> str:
    if math.isinf(found.mean):
        return "ever longer"
    return _NONE if math.isnan(found.mean) else f"{found.mean:.3g} s, {found.p99:.3g} s"


def _tier(one: Chosen) -> tuple[str, ...]:
    size = f"{one.gigabytes:,.0f} GB {'in all' if one.tier.shared else 'a node'}" if one.gigabytes else "none"
    reads = f"{one.busy:.0%} busy" if one.tier.bandwidth and one.gigabytes else ""
    return one.tier.name, size, f"{one.hit_share:.1%}", reads, _SETTINGS[one.tier.name] if one.gigabytes else "", one.why


def _side(side: Side | None) -> dict[str, Any] | None:
    if side is None:
        return None
    pools, decode = side.pools, side.pools.decode
    return {
        "prefill": {"workers": pools.prefill.servers, "utilisation": pools.prefill.utilisation if pools.prefill.servers else 0.0},
        "decode": {
            "workers": decode.workers,
            "bound_by": decode.bound_by,
            "workers_by_limit": decode.limits,
            "batch": decode.batch,
            "token_seconds": decode.token_seconds,
            "kv_room_share": decode.room_share,
        },
        "ttft_seconds": {name: asdict(found) for name, found in (("all", pools.every), ("cold", pools.cold), ("hit", pools.hit))},
        "ttft_seconds_one_prefill_worker_less": asdict(side.one_less),
        "gpus": side.gpus,
        "nodes": side.nodes,
        "worker_seconds_per_prompt": side.worker_seconds,
        "dollars_per_hour": {"gpus": side.gpu_dollars, "tiers": side.tier_dollars},
        "dollars_per_million_tokens": side.million_tokens,
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity and no nan."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
