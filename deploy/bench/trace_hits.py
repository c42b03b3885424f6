"""``headstart bench trace``: a replay of a trace, and what share of the prompts' tokens were hits, beside the most that could have been.

Three ceilings of the same requests: of a cache without limit; of the best possible one with the system's room (Belady's MIN, which knows what
comes); and of LRU with that room, which is what a plain cache gets. A system's room is its engine's own memory and its tier in DRAM together, as if
nothing lay in both.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from cachebus.errors import HeadstartError, SettingsError
from deploy.bench import benchmark, engines, goals, hit_ceiling, trace_sample
from deploy.bench.benchmark import Results, say
from deploy.bench.load import Load, Request, Served, hit_share
from deploy.bench.streaming import StreamingEngine
from deploy.bench.trace import Arrival, read_trace
from deploy.bench.trace_sample import Scale
from deploy.settings import Settings

SYSTEMS = [goals.PLAIN, goals.OURS, goals.OFFLOADING, goals.LMCACHE]
TTFT, RATE, HITS = "ttft_seconds", "requests_per_second", "hit_tokens_share"
UNLIMITED, OPTIMAL, LRU = "unlimited", "optimal", "lru"
CEILING, OF_CEILING = "hit_ceiling_", "hit_share_of_"
_SECONDS_MIN = 1.0
_REQUESTS_MAX = 1 << 20


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Replays; 0 where every system answered. Raises SettingsError."""
    names = engines.chosen(options.systems, SYSTEMS)
    if not (options.seconds >= _SECONDS_MIN and options.speed > 0 and 0 < options.share <= 1 and options.block_tokens >= 1):
        raise SettingsError("--seconds is at least 1, --speed above 0, --share above 0 and at most 1, --block-tokens at least 1")
    scale = Scale(options.seconds, options.speed, options.share, options.block_tokens, options.answer_tokens_max)
    arrivals = trace_sample.sample(read_trace(options.trace, _REQUESTS_MAX), scale)
    fitting = [one for one in arrivals if fits(trace_sample.request(one, scale), settings.model.max_model_len)]
    say(f"{len(fitting)} requests; {len(arrivals) - len(fitting)} more are longer than model.max_model_len and left out")
    if not fitting:
        raise SettingsError("no request of the trace is left: raise --seconds, --speed or --share")
    measure_one = functools.partial(measure, settings, fitting, scale, options.drain_seconds)
    results, failures = benchmark.benchmark(settings, options, names, measure_one)
    headings = {HITS: "share of the prompts' tokens cached"}
    headings |= {f"{OF_CEILING}{which}": f"as a share of the ceiling ({which})" for which in (UNLIMITED, OPTIMAL, LRU)}
    benchmark.finish(results, options, benchmark.tables(results, {**headings, RATE: "req/s", TTFT: "TTFT, s"}))
    return 1 if failures else 0


def fits(request: Request, tokens_max: int) -> bool:
    """Whether the model takes the prompt and its answer; 0: it takes any."""
    return not tokens_max or sum(piece.tokens for piece in request.pieces) + request.answer <= tokens_max


def ceilings(arrivals: Sequence[Arrival], scale: Scale, room_tokens: int, counted: Sequence[Served]) -> dict[str, float]:
    """The most that could be hit of the prompts of ``counted``, as a share of their tokens, where all ``arrivals`` go through the cache."""
    prompts = [one.blocks for one in arrivals]
    room = room_tokens // scale.block_tokens
    blocks = {
        UNLIMITED: hit_ceiling.hits_unlimited(prompts),
        OPTIMAL: hit_ceiling.hits_optimal(prompts, room),
        LRU: hit_ceiling.hits_lru(prompts, room),
    }
    tokens = sum(one.prompt for one in counted)
    return {which: sum(min(found[one.number] * scale.block_tokens, one.prompt) for one in counted) / tokens for which, found in blocks.items()}


def measure(
    settings: Settings,
    arrivals: Sequence[Arrival],
    scale: Scale,
    drain_seconds: float,
    system: str,
    started: list[StreamingEngine],
    results: Results,
) -> None:
    """The replay on one system. Raises HeadstartError where nothing was answered."""
    engine = started[0]
    requests = [trace_sample.request(one, scale) for one in arrivals]
    served = engine.run(Load(requests, scale.seconds + drain_seconds))
    answered = [one for one in served if one.finished]
    if not answered:
        raise HeadstartError("no request was answered: raise --seconds")
    if len(answered) < len(requests):
        say(f"{system}: {len(requests) - len(answered)} requests were not answered {drain_seconds:g} s after the last arrival; the others count")
    room = engine.capacity.kv_tokens
    if system != goals.PLAIN:
        room += int(settings.cache.max_local_cpu_size * 1e9) // engine.capacity.token_bytes
    place = (round(sum(one.prompt for one in served) / len(served)), 0)
    case = goals.OWN_HIT if system == goals.PLAIN else goals.HIT
    share = results.add(system, case, place, HITS, [hit_share(answered)])
    for which, ceiling in ceilings(arrivals, scale, room, answered).items():
        results.add(system, case, place, f"{CEILING}{which}", [ceiling])
        if ceiling:
            results.add(system, case, place, f"{OF_CEILING}{which}", [share / ceiling])
    results.add(system, case, place, TTFT, [one.ttft for one in answered])
    results.add(system, case, place, RATE, [len(answered) / max(one.last or 0.0 for one in answered)])
