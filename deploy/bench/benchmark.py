"""What the benchmarks of many requests have in common: options, one system after the other, rows, and what is said meanwhile."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from cachebus.engine.command import served_name
from cachebus.errors import HeadstartError, SettingsError
from deploy.bench import engines, report
from deploy.bench.load import Piece, Request
from deploy.bench.streaming import StreamingEngine
from deploy.settings import Settings

WARM_UP_SEED = 1 << 40
LEFT_TOKENS_MAX = 256
"""How many tokens of what was cached a hit may leave to be computed: a chunk of the systems that store whole chunks only."""
_WARM_UP_TOKENS, _WARM_UP_SECONDS_MAX = 2048, 120.0


@dataclass
class Results:
    """The rows of one benchmark, made as they are measured."""

    bench: str
    settings: Settings
    rows: list[report.Row] = field(default_factory=list)

    def add(self, system: str, case: str, place: tuple[int, int], metric: str, values: Sequence[float]) -> float:
        """A row of ``values``, and its median; ``place``: the prompt's length in tokens, and how many requests ran at a time."""
        row = report.Row(
            self.bench,
            system,
            served_name(self.settings.model),
            self.settings.model.kv_cache_dtype,
            case,
            *place,
            metric,
            *report.figure(values),
            len(values),
        )
        self.rows.append(row)
        say(f"{system}, {case}, {place[0]} tokens, {place[1]} at a time, {metric}: {row.median:g} (p99 {row.p99:g}, of {len(values)})")
        return row.median


Measure = Callable[[str, list[StreamingEngine], Results], None]
"""Measures one system's engines."""


def benchmark(settings: Settings, options: argparse.Namespace, names: Sequence[str], measure: Measure, workers: int = 1) -> tuple[Results, int]:
    """Starts each system, with ``workers`` engines where they share a cache, measures it, ends it; the results, and how many systems failed."""
    results, failures = Results(options.bench, settings), 0
    with tempfile.TemporaryDirectory(prefix="headstart-bench-") as folder:
        logs = Path(options.logs or folder)
        logs.mkdir(parents=True, exist_ok=True)
        for name in names:
            say(f"{name}: starting")
            place = engines.Place(settings, logs, options.load_format, int(options.kv_cache_gb * 1e9), workers)
            try:
                with engines.KNOWN[name](place) as started:
                    say(f"{name}: {len(started)} engines, {started[0].capacity.kv_tokens} tokens of KV each in their own memory")
                    warm_up(started, settings)
                    measure(name, started, results)
                    # Before it is ended, which takes long where it holds much memory: what is cut off then was measured.
                    _written(results, options)
            except HeadstartError as error:
                # The other systems' figures are worth having all the same.
                failures += 1
                say(f"FAILED: {name}: {error}")
    return results, failures


def finish(results: Results, options: argparse.Namespace, tables: Iterable[str]) -> None:
    """Writes and prints what was measured."""
    result = _written(results, options)
    print(json.dumps(result) if options.json else "\n\n".join(tables))


def _written(results: Results, options: argparse.Namespace) -> dict[str, Any]:
    """The document of what was measured so far, in ``options.output`` too, where that is given."""
    bench = results.bench
    arguments = sys.argv[sys.argv.index(bench) + 1 :] if bench in sys.argv else []
    result = report.document(results.rows, ["headstart", "bench", bench, *arguments], gpus())
    if options.output:
        report.write(options.output, result)
    return result


def warm_up(started: Sequence[StreamingEngine], settings: Settings) -> None:
    """Prompts that nobody asks again, until kernels are compiled and memory was touched; leaves the engines' own caches empty."""
    tokens = min(_WARM_UP_TOKENS, (settings.model.max_model_len or _WARM_UP_TOKENS) // 2)
    for number, engine in enumerate(started):
        for run in range(2):
            requests = [Request([Piece(WARM_UP_SEED + number * 100 + run * 10 + one, tokens)], 8) for one in range(2)]
            engine.answers(requests, _WARM_UP_SECONDS_MAX, clients=2)
        engine.empty_hbm()


def numbers(option: str, text: str, least: float = 1) -> list[int]:
    """The whole numbers of an option with commas. Raises SettingsError."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise SettingsError(f"{option} {text}: give whole numbers, such as 10,50") from error
    if min(found) < least:
        raise SettingsError(f"{option} {text}: give at least {least:g}")
    return found


def tables(results: Results, metrics: dict[str, str], scale: float = 1.0, *, worst: bool = False) -> list[str]:
    """A table for each metric (with its heading) and number of requests at a time: medians (``worst``: 99th percentiles) times ``scale``,
    prompts' lengths in columns."""
    found = []
    for metric, heading in metrics.items():
        for concurrency in sorted({row.concurrency for row in results.rows if row.metric == metric}):
            chosen = [row for row in results.rows if (row.metric, row.concurrency) == (metric, concurrency)]
            rows = [msgspec.structs.replace(row, median=(row.p99 if worst else row.median) * scale) for row in chosen]
            found.append(report.table(rows, f"{heading}, {concurrency} at a time" if concurrency else heading))
    return found


def gpus() -> dict[str, Any]:
    """The machine's GPUs, for the document's host."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = [line.partition(":")[2].strip() for name in files for line in name.read_text().splitlines() if line.startswith("Model")]
    return {"gpus": models} if models else {}


def say(text: str) -> None:
    """Tells how far it is."""
    print(f"bench: {text}", file=sys.stderr, flush=True)
