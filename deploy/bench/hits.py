"""``headstart bench hits``: what a hit costs inside the engine, without HTTP, text and routing: on a worker that did not compute the prompt.

One system at a time, each prompt of random token ids. Headstart's hit is on an engine that starts after the one that computed was killed (SIGKILL),
from DRAM and, if wished, from the tiers below once DRAM was cleared; the others' is on the same engine after its own prefix cache was emptied (and it
is checked that it was). With ``--restart`` Headstart's engine, and the one of LMCache's server, are killed and started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachebus.engine.command import WorkerSpec, served_name, transfer_config
from cachebus.errors import HeadstartError, SettingsError
from cachebus.wire import Tier
from deploy.bench import benchmark, engines, goals, report, systems
from deploy.bench.benchmark import LEFT_TOKENS_MAX, say
from deploy.bench.offline import OfflineEngine
from deploy.launcher import Cluster, private_run_dir
from deploy.settings import Settings

_WARM_UP_TOKENS, _WARM_UP_SEED = 4096, 1 << 20
_TTFT = "ttft_seconds"
_SETTLE_SECONDS = 3.0
_WRITTEN_SECONDS_MAX, _POLL_SECONDS = 120.0, 0.1
_PUBLISHED_SECONDS = 0.5
"""Until a hit in the engine's own cache is asked for: it is a measure of the engine, not of what a system still does for the prompt before."""


@dataclass
class Gathered:
    """Seconds to the first token by (system, case, prompt length)."""

    seconds: dict[tuple[str, str, int], list[float]] = field(default_factory=dict)
    shares: dict[tuple[str, str, int], list[float]] = field(default_factory=dict)
    """What share of a prompt's tokens nobody computed, where an engine may choose to compute some."""

    def add(self, system: str, case: str, length: int, seconds: float) -> None:
        """One more measurement."""
        self.seconds.setdefault((system, case, length), []).append(seconds)


@dataclass(frozen=True)
class Plan:
    """What is asked, run by run, the longest prompts first: what is asked last is found again in a store that holds one run."""

    lengths: Sequence[int]
    runs: int
    load_format: str
    dram_gigabytes: int
    hit_runs: int
    """How often each hit is asked for; by its own engine once a run."""
    tiers: Sequence[Tier] = ()
    """Tiers below DRAM from which ours are asked for, too."""
    restart: bool = False

    def seed(self, length: int, run: int) -> int:
        """The prompt's seed: another for each length and run."""
        return length * 100 + run


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Measures. Raises HeadstartError where a system does not work or a hit is none."""
    known = {goals.PLAIN: _plain, goals.OURS: _headstart, goals.OFFLOADING: _offloading, goals.LMCACHE: _lmcache}
    wanted = options.systems.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise SettingsError(f"--systems: {unknown[0]!r} is unknown; there are: {', '.join(known)}")
    lengths = sorted({int(text) for text in options.lengths.split(",")}, reverse=True)
    tiers = _tiers(settings, options.tiers)
    dram_gigabytes = int(settings.cache.max_local_cpu_size)
    plan = Plan(lengths, options.runs, options.load_format, dram_gigabytes, options.hit_runs or options.runs, tiers, options.restart)
    gathered = Gathered()
    failures = 0
    with tempfile.TemporaryDirectory(prefix="headstart-bench-") as folder:
        for name in wanted:
            say(f"{name}: starting")
            try:
                known[name](settings, plan, Path(options.logs or folder), gathered)
            except HeadstartError as error:
                # The other systems' figures are worth having all the same.
                failures += 1
                say(f"FAILED: {name}: {error}")
    rows = _rows(gathered, settings)
    result = report.document(rows, ["headstart", "bench", "hits", *sys.argv[sys.argv.index("hits") + 1 :]], benchmark.gpus())
    if options.output:
        report.write(options.output, result)
    print(json.dumps(result) if options.json else report.table([row for row in rows if row.metric == _TTFT], "TTFT, s"))
    return 1 if failures else 0


def _tiers(settings: Settings, text: str) -> list[Tier]:
    """The tiers of ``--tiers``. Raises SettingsError where one is not known or not configured."""
    places: dict[str, tuple[Tier, object, str]] = {
        "nvme": ("nvme", settings.cache.local_disk, "cache.local_disk"),
        "redis": ("redis", settings.cache.remote_url, "cache.remote_url"),
    }
    found: list[Tier] = []
    for name in filter(None, text.split(",")):
        if name not in places:
            raise SettingsError(f"--tiers: {name!r} is unknown; there are: {', '.join(places)}")
        tier, is_set, key = places[name]
        if not is_set:
            raise SettingsError(f"--tiers {name}: set {key}")
        found.append(tier)
    return found


@contextmanager
def _engine(settings: Settings, plan: Plan, log: Path, transfer: dict[str, Any] | None = None) -> Iterator[OfflineEngine]:
    place = engines.Place(settings, log.parent, plan.load_format)
    engine = OfflineEngine(engines.engine_options(place, transfer), log, engines.environment(place))
    try:
        for _ in range(2):
            engine.ask(_WARM_UP_SEED, _WARM_UP_TOKENS)
            engine.empty_hbm()
            time.sleep(_SETTLE_SECONDS)
        yield engine
    finally:
        engine.stop()


def _cold(engine: OfflineEngine, plan: Plan, system: str, gathered: Gathered, then: Callable[[int, int], None]) -> None:
    """Asks every prompt for the first time, and once more out of the engine's own cache; ``then``: what follows, with length and seed."""
    for number in range(plan.runs):
        for length in plan.lengths:
            asked = engine.ask(plan.seed(length, number), length)
            if asked.cached:
                raise HeadstartError(f"a prompt that nobody saw before had {asked.cached} tokens cached")
            gathered.add(system, goals.COLD, length, asked.seconds)
            time.sleep(_PUBLISHED_SECONDS)
            gathered.add(system, goals.OWN_HIT, length, _hit(engine, plan.seed(length, number), length))
    for length in plan.lengths:
        _told(gathered, system, length, goals.COLD, goals.OWN_HIT)
        then(length, plan.seed(length, plan.runs - 1))


def _hit(engine: OfflineEngine, seed: int, length: int) -> float:
    asked = engine.ask(seed, length)
    if asked.cached < length - LEFT_TOKENS_MAX:
        raise HeadstartError(f"a hit of {length} tokens was one of {asked.cached}")
    return asked.seconds


def _plain(settings: Settings, plan: Plan, logs: Path, gathered: Gathered) -> None:
    with _engine(settings, plan, logs / "vllm.log") as engine:
        _cold(engine, plan, goals.PLAIN, gathered, lambda length, seed: None)


def _after_emptying(engine: OfflineEngine, plan: Plan, system: str, gathered: Gathered) -> Callable[[int, int], None]:
    def then(length: int, seed: int) -> None:
        time.sleep(_SETTLE_SECONDS)
        _hits(engine, plan, (system, goals.HIT, length), seed, gathered)

    return then


def _hits(engine: OfflineEngine, plan: Plan, what: tuple[str, str, int], seed: int, gathered: Gathered) -> None:
    """Asks for one hit as often as the plan says; ``what``: system, case and length."""
    for _ in range(plan.hit_runs):
        engine.empty_hbm()
        gathered.add(*what, _hit(engine, seed, what[2]))
    _told(gathered, what[0], what[2], what[1])


def _all_hits(engine: OfflineEngine, plan: Plan, system: str, case: str, gathered: Gathered) -> None:
    """The last run's prompt of each length."""
    for length in plan.lengths:
        _hits(engine, plan, (system, case, length), plan.seed(length, plan.runs - 1), gathered)


def _offloading(settings: Settings, plan: Plan, logs: Path, gathered: Gathered) -> None:
    with _engine(settings, plan, logs / "offloading.log", engines.offloading_transfer(plan.dram_gigabytes)) as engine:
        _cold(engine, plan, goals.OFFLOADING, gathered, _after_emptying(engine, plan, goals.OFFLOADING, gathered))


def _lmcache(settings: Settings, plan: Plan, logs: Path, gathered: Gathered) -> None:
    with systems.lmcache_server(settings, logs, gigabytes=plan.dram_gigabytes) as port:
        with _engine(settings, plan, logs / "lmcache.log", systems.lmcache_transfer(port)) as engine:
            _cold(engine, plan, goals.LMCACHE, gathered, _after_emptying(engine, plan, goals.LMCACHE, gathered))
        if plan.restart:
            with _engine(settings, plan, logs / "lmcache-again.log", systems.lmcache_transfer(port)) as engine:
                _all_hits(engine, plan, goals.LMCACHE, goals.RESTART, gathered)


def _headstart(settings: Settings, plan: Plan, logs: Path, gathered: Gathered) -> None:
    with private_run_dir(settings) as private:
        cluster = Cluster(private, logs)
        cluster.start_bus(say)
        try:
            with _engine(private, plan, logs / "headstart-cold.log", _ours(private, cluster.run_dir, "one")) as engine:
                _cold(engine, plan, goals.OURS, gathered, lambda length, seed: None)
                time.sleep(_SETTLE_SECONDS)
            cases = [goals.HIT, goals.RESTART] if plan.restart else [goals.HIT]
            for case in cases:
                with _engine(private, plan, logs / f"headstart-{case}.log", _ours(private, cluster.run_dir, "two")) as engine:
                    _all_hits(engine, plan, goals.OURS, case, gathered)
                    for tier in plan.tiers if case == cases[-1] else ():
                        _from_tier(engine, plan, cluster.run_dir, tier, gathered)
            _check_bus(cluster.run_dir)
            engines.await_released(cluster.run_dir)
        finally:
            cluster.stop()


def _from_tier(engine: OfflineEngine, plan: Plan, run_dir: Path, tier: Tier, gathered: Gathered) -> None:
    """Hits from a tier below DRAM, after what lies above it was cleared. How much of them is pulled is the engine's choice."""
    above: list[Tier] = ["dram"] if tier == "nvme" else ["dram", "nvme"]
    for length in plan.lengths:
        for _ in range(plan.hit_runs):
            _await_written(run_dir)
            engines.clear(run_dir, above)
            engine.empty_hbm()
            asked = engine.ask(plan.seed(length, plan.runs - 1), length)
            gathered.add(goals.OURS, tier, length, asked.seconds)
            gathered.shares.setdefault((goals.OURS, tier, length), []).append(asked.cached / length)
        _told(gathered, goals.OURS, length, tier)
        say(f"  of its tokens came from there: {[round(share, 3) for share in gathered.shares[goals.OURS, tier, length]]}")


def _await_written(run_dir: Path) -> None:
    deadline = time.monotonic() + _WRITTEN_SECONDS_MAX
    while left := engines.statistics(run_dir)["write_behind_bytes"]:
        if time.monotonic() > deadline:
            raise HeadstartError(f"{left / 1e9:.1f} GB were not written to the tiers below within {_WRITTEN_SECONDS_MAX:g} s")
        time.sleep(_POLL_SECONDS)


def _ours(settings: Settings, run_dir: Path, name: str) -> dict[str, Any]:
    return transfer_config(WorkerSpec(name, "decode", settings.model, settings.decode, settings.cache, settings.security, run_dir))


def _check_bus(run_dir: Path) -> None:
    values = engines.statistics(run_dir)
    say(f"the bus: {json.dumps({name: value for name, value in values.items() if value and 'messages' not in name})}")
    if values["integrity_failures_total"]:
        raise HeadstartError("a chunk did not match its digest where it arrived")


def _told(gathered: Gathered, system: str, length: int, *cases: str) -> None:
    for case in cases:
        values = gathered.seconds[system, case, length]
        say(f"{system}, {length} tokens, {case}: {statistics.median(values):.4f} s {[round(value, 4) for value in values]}")


def _rows(gathered: Gathered, settings: Settings) -> list[report.Row]:
    model, kv_dtype = served_name(settings.model), settings.model.kv_cache_dtype
    rows = []
    for metric, found in ((_TTFT, gathered.seconds), ("hit_tokens_share", gathered.shares)):
        for (system, case, length), values in found.items():
            rows.append(report.Row("hits", system, model, kv_dtype, case, length, 1, metric, *report.figure(values), len(values)))
    return rows
