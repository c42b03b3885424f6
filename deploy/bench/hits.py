"""``headstart bench hits``: what a hit costs inside the engine, without HTTP, text and routing: on a worker that did not compute the prompt.

One system at a time, each prompt of random token ids. Headstart's hit is on an engine that starts after the one that computed has ended, from
DRAM; the others' is on the same engine after its own prefix cache was emptied (and it is checked that it was).
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
from deploy.bench import benchmark, engines, goals, report, systems
from deploy.bench.benchmark import LEFT_TOKENS_MAX, say
from deploy.bench.offline import OfflineEngine
from deploy.launcher import Cluster, private_run_dir
from deploy.settings import Settings

_WARM_UP_TOKENS, _WARM_UP_SEED = 4096, 1 << 20
_SETTLE_SECONDS = 3.0
_PUBLISHED_SECONDS = 0.5
"""Until a hit in the engine's own cache is asked for: it is a measure of the engine, not of what a system still does for the prompt before."""


@dataclass
class Gathered:
    """Seconds to the first token by (system, case, prompt length)."""

    seconds: dict[tuple[str, str, int], list[float]] = field(default_factory=dict)

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
    plan = Plan(lengths, options.runs, options.load_format, int(settings.cache.max_local_cpu_size))
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
    print(json.dumps(result) if options.json else report.table(rows, "TTFT, s"))
    return 1 if failures else 0


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
        for _ in range(plan.runs):
            engine.empty_hbm()
            gathered.add(system, goals.HIT, length, _hit(engine, seed, length))
        _told(gathered, system, length, goals.HIT)

    return then


def _offloading(settings: Settings, plan: Plan, logs: Path, gathered: Gathered) -> None:
    with _engine(settings, plan, logs / "offloading.log", engines.offloading_transfer(plan.dram_gigabytes)) as engine:
        _cold(engine, plan, goals.OFFLOADING, gathered, _after_emptying(engine, plan, goals.OFFLOADING, gathered))


def _lmcache(settings: Settings, plan: Plan, logs: Path, gathered: Gathered) -> None:
    with (
        systems.lmcache_server(settings, logs, gigabytes=plan.dram_gigabytes) as port,
        _engine(settings, plan, logs / "lmcache.log", systems.lmcache_transfer(port)) as engine,
    ):
        _cold(engine, plan, goals.LMCACHE, gathered, _after_emptying(engine, plan, goals.LMCACHE, gathered))


def _headstart(settings: Settings, plan: Plan, logs: Path, gathered: Gathered) -> None:
    with private_run_dir(settings) as private:
        cluster = Cluster(private, logs)
        cluster.start_bus(say)
        try:
            with _engine(private, plan, logs / "headstart-1.log", _ours(private, cluster.run_dir, "one")) as engine:
                _cold(engine, plan, goals.OURS, gathered, lambda length, seed: None)
                time.sleep(_SETTLE_SECONDS)
            with _engine(private, plan, logs / "headstart-2.log", _ours(private, cluster.run_dir, "two")) as engine:
                for length in plan.lengths:
                    for _ in range(plan.runs):
                        gathered.add(goals.OURS, goals.HIT, length, _hit(engine, plan.seed(length, plan.runs - 1), length))
                        engine.empty_hbm()
                    _told(gathered, goals.OURS, length, goals.HIT)
            _check_bus(cluster.run_dir)
            engines.await_released(cluster.run_dir)
        finally:
            cluster.stop()


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
    for (system, case, length), values in gathered.seconds.items():
        rows.append(report.Row("hits", system, model, kv_dtype, case, length, 1, "ttft_seconds", *report.figure(values), len(values)))
    return rows
