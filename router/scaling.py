"""How many workers each pool should have. Pure: readings and the time go in, sizes with their reasons come out.

Both pools follow what is absolute in the load, not what a larger pool would change: seconds of prefill that come each second and that wait, blocks
of KV in use, time between tokens times those who share it. So nothing compounds while new workers start. What is larger than needed shrinks by
small steps, and only where it was so for a while; growing is judged against the limits themselves, shrinking against a margin below them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from router.scaling_settings import ScalingSettings

AVERAGE_SECONDS, BACKLOG_SECONDS, LOAD_SECONDS = 30.0, 90.0, 180.0
"""Over how long blocks and time between tokens are averaged; what waits for prefill, which a new worker can only help where it lasts; and what comes
of it, by fewer and larger pieces."""
_BESIDE_MOST = 0.8
"""What share of decode workers' time is taken to go to prompts at most."""
_FLOOR_BELIEVED, _FLOOR_MOST = 0.8, 0.8
"""What of the time that a token takes whoever shares it is believed, since it is learnt; and what share of the limit it may be at most."""
_MARGIN = 0.85
"""A pool shrinks to where its limits would be kept to so much of them: a worker fewer must not be missed at once."""
_GROWS_BY = 4
"""A pool may at most double at once, or grow by so many."""
_SHRINKS_BY, _SHRINK_STEP_SECONDS = 0.1, 60.0
"""This share of a pool at most, but always one worker, goes in each such span of the clock: the same one for all, so that who has more keeps more."""
_WHOLE = 1e-9
"""What a quotient may be above a whole number by rounding alone."""


@dataclass(frozen=True)
class Reading:
    """What is known at one moment of both pools.

    ``prefill``, ``decode``: workers that take requests. ``backlog_seconds``: of prefill, before all requests together, ``prompts`` of them;
    ``prefill_load``: seconds of prefill that came each second since the reading before, wherever it is computed; ``decode_load``: of
    prompts that decode workers computed; ``lacking``: requests since then that lacked ``router.prefill_tokens_min`` tokens.
    ``kv_used``: KV blocks in use or waited for, in decode workers' worth; ``inter_token_seconds``: mean, None where nothing was generated;
    ``alone_seconds``: what it would be for a stream alone, 0 where that is not known. ``places``: workers' worth of requests at once.
    """

    prefill: int
    decode: int
    backlog_seconds: float = 0.0
    prompts: float = 0.0
    prefill_load: float = 0.0
    lacking: int = 0
    kv_used: float = 0.0
    inter_token_seconds: float | None = None
    alone_seconds: float = 0.0
    places: float = 0.0
    decode_load: float = 0.0


@dataclass(frozen=True)
class PoolState:
    """``wanted``: what was said last, before the guard; ``needs``: of each moment, with the margin; ``shrank_in``: in which step it shrank last."""

    wanted: int
    needs: tuple[tuple[float, int], ...] = ()
    shrank_in: float = -1.0


@dataclass(frozen=True)
class State:
    """What the rule remembers from one reading to the next."""

    since: float
    prefill: PoolState
    decode: PoolState
    readings: tuple[tuple[float, Reading], ...] = ()


@dataclass(frozen=True)
class Size:
    """A pool's wanted size, and why."""

    wanted: int
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """What both pools should have."""

    prefill: Size
    decode: Size


@dataclass
class _Need:
    """``grow``: so many are needed now; ``keep``: so many should stay, with a margin."""

    grow: int
    keep: int
    reasons: list[str] = field(default_factory=list)


def decide(rule: ScalingSettings, state: State | None, reading: Reading, now: float) -> tuple[State, Sizes]:
    """The sizes wanted now (seconds, any clock that only rises), and what to pass in the next time. ``state``: None at the first one."""
    if state is None:
        begun = Reading(reading.prefill, reading.decode)
        first = PoolState(_within(begun.prefill, rule.prefill_min, rule.prefill_max))
        state = State(now, first, PoolState(_within(begun.decode, rule.decode_min, rule.decode_max)))
    readings = (*(old for old in state.readings if now - old[0] < LOAD_SECONDS), (now, reading))
    prefill_need, decode_need = _prefill_need(rule, state, readings, now), _decode_need(rule, readings, now)
    prefill, why_prefill = _moved(rule, state.prefill, prefill_need, (rule.prefill_min, rule.prefill_max), (state.since, now))
    decode, why_decode = _moved(rule, state.decode, decode_need, (rule.decode_min, rule.decode_max), (state.since, now))
    guarded = guard(rule, prefill.wanted, decode.wanted)
    least, most = rule.prefill_per_decode_min, rule.prefill_per_decode_max
    for said, before, after in ((why_prefill, prefill.wanted, guarded[0]), (why_decode, decode.wanted, guarded[1])):
        if before != after:
            said.append(f"guard: {least:g} to {most:g} prefill workers for each decode worker: {after} instead of {before}")
    sizes = Sizes(Size(guarded[0], tuple(why_prefill)), Size(guarded[1], tuple(why_decode)))
    return replace(state, prefill=prefill, decode=decode, readings=readings), sizes


def guard(rule: ScalingSettings, prefill: int, decode: int) -> tuple[int, int]:
    """The sizes, kept to the guard's ratios, rounded to the wider side: the smaller pool grows, and where it may not the larger one shrinks.

    No prefill worker at all is no ratio: that the cache serves everything.
    """
    least, most = rule.prefill_per_decode_min, rule.prefill_per_decode_max
    if not prefill:
        return prefill, decode
    while prefill > _ceil(most * decode) and decode < rule.decode_max:
        decode += 1
    prefill = min(prefill, _ceil(most * decode))
    prefill = max(prefill, min(rule.prefill_max, math.floor(least * decode + _WHOLE)))
    while prefill < math.floor(least * decode + _WHOLE):
        decode -= 1
    return prefill, decode


def _prefill_need(rule: ScalingSettings, state: State, readings: tuple[tuple[float, Reading], ...], now: float) -> _Need:
    recent = [one for at, one in readings if now - at < AVERAGE_SECONDS]
    waited = [one for at, one in readings if now - at < BACKLOG_SECONDS]
    backlog, prompts = (sum(values) / len(waited) for values in zip(*((one.backlog_seconds, one.prompts) for one in waited), strict=True))
    load = sum(one.prefill_load for _, one in readings) / len(readings)
    woken = len(readings) > 1 and not readings[-2][1].prefill and readings[-1][1].prefill > 0
    lacking = sum(one.lacking for one in recent)
    # Not by the backlog: without prefill workers it is one of short prompts, too, which would bring back a pool that does not compute them.
    if not (rule.prefill_min or lacking or woken):
        return _Need(0, 0, [f"nobody lacked a prompt worth a prefill for {AVERAGE_SECONDS:g} s"])
    # One prompt keeps one worker busy, however long it is.
    by_load, by_backlog = _ceil(load / rule.prefill_busy), _ceil(min(prompts, backlog / rule.backlog_seconds))
    keep = max(_ceil(load / rule.prefill_busy / _MARGIN), _ceil(min(prompts, backlog / rule.backlog_seconds / _MARGIN)), 1)
    said = [
        f"load: {load:.2f} workers' time of prefill comes, each may be busy {rule.prefill_busy:g}: {by_load}",
        f"backlog: {backlog:.2f} s of {prompts:.1f} prompts, {rule.backlog_seconds:g} s may wait for each worker: {by_backlog}",
    ]
    if not state.prefill.wanted:
        said.append("wakes: prompts lack what only computing brings, or somebody else started a worker")
    return _Need(max(1, by_load, by_backlog), keep, said)


def _decode_need(rule: ScalingSettings, readings: tuple[tuple[float, Reading], ...], now: float) -> _Need:
    recent = [one for at, one in readings if now - at < AVERAGE_SECONDS]
    used, places = (sum(values) / len(recent) for values in zip(*((one.kv_used, one.places) for one in recent), strict=True))
    # What a stream alone waits for its tokens no number of workers makes less; the rest is shared by as many as there are.
    alone = min(_FLOOR_BELIEVED * readings[-1][1].alone_seconds, _FLOOR_MOST * rule.inter_token_seconds)
    # Nor can they what it waits for prompts beside it: those are for prefill workers, whom more decode workers would only leave with less to do.
    waited = [one for at, one in readings if now - at < BACKLOG_SECONDS]
    beside = min(_BESIDE_MOST, sum(one.decode_load for one in waited) / max(1, sum(one.decode for one in waited)))
    paces = [((1 - beside) * one.inter_token_seconds, one.decode) for one in waited if one.inter_token_seconds is not None]
    pace = sum(seconds for seconds, _ in paces) / len(paces) if paces else 0.0
    shared = sum(max(0.0, seconds - alone) * workers for seconds, workers in paces) / len(paces) if paces else 0.0
    by_blocks, by_pace = _ceil(used / rule.kv_blocks_used), _ceil(shared / (rule.inter_token_seconds - alone))
    said = [
        f"KV blocks: {used:.2f} workers' worth in use or waited for, {rule.kv_blocks_used:g} of each may be: {by_blocks}",
        f"requests: {places:.2f} workers' worth at once: {_ceil(places)}",
        f"tokens: {1e3 * pace:.1f} ms apart, without {beside:.2f} of the time for prompts beside them, {1e3 * alone:.1f} for a stream alone, "
        f"{1e3 * rule.inter_token_seconds:g} they may be: {by_pace}",
    ]
    keep = max(_ceil(used / rule.kv_blocks_used / _MARGIN), _ceil(places / _MARGIN), _ceil(shared / (_MARGIN * (rule.inter_token_seconds - alone))))
    return _Need(max(by_blocks, by_pace, _ceil(places)), keep, said)


def _moved(rule: ScalingSettings, pool: PoolState, need: _Need, bounds: tuple[int, int], times: tuple[float, float]) -> tuple[PoolState, list[str]]:
    """A pool's next size. ``times``: when the rule began, and now."""
    since, now = times
    window = max(rule.shrink_seconds, rule.zero_seconds)
    grow, keep = _within(need.grow, *bounds), _within(need.keep, *bounds)
    needs = (*((at, size) for at, size in pool.needs if now - at < window), (now, keep))
    wanted, reasons, shrank_in = pool.wanted, list(need.reasons), pool.shrank_in
    if not bounds[0] <= need.grow <= bounds[1]:
        reasons.append(f"bounds: {bounds[0]} to {bounds[1]}")
    kept = max(size for at, size in needs if now - at < rule.shrink_seconds or not rule.shrink_seconds)
    # Zero is a promise that nothing will be missed for a while, so it takes longer to believe.
    if not kept and (now - since < rule.zero_seconds or max(size for _, size in needs)):
        kept = 1
    if grow > wanted:
        most = wanted + max(_GROWS_BY, wanted)
        if grow > most:
            reasons.append(f"step: at most {most} at once")
        wanted = min(grow, most)
    elif kept < wanted and now - since < rule.shrink_seconds:
        reasons.append(f"keeps {wanted}: known for {now - since:.0f} s only")
    elif kept < wanted and shrank_in != (step := now // _SHRINK_STEP_SECONDS):
        wanted, shrank_in = max(kept, wanted - max(1, int(_SHRINKS_BY * wanted))), step
        reasons.append(f"shrinks: {kept} were enough for {rule.shrink_seconds if kept else rule.zero_seconds} s")
    elif kept < wanted:
        reasons.append(f"keeps {wanted}: it shrank within these {_SHRINK_STEP_SECONDS:g} s")
    elif keep < wanted:
        reasons.append(f"keeps {wanted}: {kept} were needed within {rule.shrink_seconds} s")
    return PoolState(wanted, needs, shrank_in), reasons


def _within(size: int, least: int, most: int) -> int:
    return max(least, min(most, size))


def _ceil(value: float) -> int:
    return math.ceil(value - _WHOLE)
