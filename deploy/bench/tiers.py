"""The benchmark ``headstart bench tiers``: bytes per second into each tier and out of it, beside what the host can do and what LMCache does.

All systems take turns, each measured once in a round and not always in the same order, so that what changes on the machine meanwhile changes for all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from cachebus.errors import HeadstartError, SettingsError
from deploy.bench import quiet, report, tier_goals, tier_lanes, tier_limits, tier_lmcache, tier_nodes
from deploy.bench.tier_values import Load, Subject

_CHUNKS_MIN = 4
_REDIS_PORT = 6379


@dataclass
class _Gathered:
    """Bytes per second by system, case, concurrency and metric."""

    speeds: dict[tuple[str, str, int, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    runs: int = 0
    disturbed: int = 0


def run(options: argparse.Namespace) -> int:
    """Measures, prints a table or one JSON object, and returns the exit code. Raises HeadstartError."""
    loads = chosen_loads(options.chunk_mb, options.gb)
    _say_what_is_missing(options)
    gathered = _Gathered()
    for load in loads:
        with _subjects(load, options) as subjects:
            for number in range(-1, options.runs):
                for subject in in_turn(subjects, number) if number >= 0 else [one for one in subjects if not one.warms_itself]:
                    _measure(gathered, subject, load, counts=number >= 0)
                _say(f"{load.label}: " + ("warm" if number < 0 else f"round {number + 1} of {options.runs}"))
    rows = _rows(gathered)
    command = ["headstart", "bench", "tiers", *sys.argv[sys.argv.index("tiers") + 1 :]] if "tiers" in sys.argv else ["headstart", "bench", "tiers"]
    result = report.document(rows, command, {"runs_disturbed": gathered.disturbed, "runs": gathered.runs})
    if options.output:
        report.write(options.output, result)
    print(json.dumps(result) if options.json else tier_goals.table(rows))
    for outcome in tier_goals.outcomes(rows):
        verdict = "" if outcome.reached else f", MISSED: at least {outcome.share_min}"
        _say(f"{outcome.case}, {outcome.metric.partition('_')[0]} / {outcome.system}: {outcome.share:.2f}{verdict}")
    if gathered.disturbed:
        _say(f"{gathered.disturbed} of {gathered.runs} runs were disturbed by other processes on this machine")
    return 0


def chosen_loads(sizes: str, gigabytes: float) -> list[Load]:
    """What to move for ``--chunk-mb`` and ``--gb``. Raises SettingsError."""
    try:
        chosen = [int(float(part) * 2**20) for part in sizes.split(",")]
    except ValueError as error:
        raise SettingsError(f"--chunk-mb {sizes}: give sizes in MiB, such as 4,32") from error
    if min(chosen) < 4096 or any(size % 4096 for size in chosen):
        raise SettingsError(f"--chunk-mb {sizes}: a chunk is whole pages of 4 KiB")
    # As many for each thread, so that fio's jobs get the same.
    return [Load(size, max(_CHUNKS_MIN, int(gigabytes * 1e9) // size // _CHUNKS_MIN * _CHUNKS_MIN)) for size in chosen]


def in_turn(subjects: Sequence[Subject], number: int) -> list[Subject]:
    """The order of a round: what is compared one right after the other, and each time another one first.

    Whoever is first finds memory that a server gave back to the system meanwhile, and caches of another tier.
    """
    by_tier: dict[str, list[Subject]] = {}
    for subject in subjects:
        by_tier.setdefault(subject.case.partition(",")[0], []).append(subject)
    return [one for group in by_tier.values() for one in group[number % len(group) :] + group[: number % len(group)]]


@contextlib.contextmanager
def _subjects(load: Load, options: argparse.Namespace) -> Iterator[list[Subject]]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headstart-bench-", dir=options.folder)))
        url, at = options.redis_url, None
        if not url and shutil.which("redis-server"):
            url = f"redis://127.0.0.1:{stack.enter_context(tier_limits.redis_server(folder))}/0"
        found = stack.enter_context(tier_lanes.subjects(load, folder / "headstart", url))
        found += stack.enter_context(tier_nodes.subjects(load))
        found += tier_limits.fio(load, folder)
        if url:
            parts = urlsplit(url)
            at = (parts.hostname or "127.0.0.1", parts.port or _REDIS_PORT)
            found += tier_limits.redis_benchmark(load, *at)
        found += tier_limits.zeromq_streams(load)
        if options.lmcache_python:
            found += tier_lmcache.subjects(load, folder, str(options.lmcache_python), at)
        yield found


def _measure(gathered: _Gathered, subject: Subject, load: Load, *, counts: bool) -> None:
    """Measures once; again where other processes kept the machine busy. The quietest try counts."""

    def measure(_: int) -> dict[str, float]:
        # What others left to be written would be written now.
        os.sync()
        return subject.measure()

    speeds, disturbed = quiet.quietest(measure, quiet.TRIES_MAX if counts else 1)
    if not counts:
        return
    gathered.runs += 1
    gathered.disturbed += disturbed
    for metric, value in speeds.items():
        gathered.speeds[subject.system, f"{subject.case}, {load.label}", subject.concurrency[metric], metric].append(value)


def _rows(gathered: _Gathered) -> list[report.Row]:
    rows = []
    for (system, case, concurrency, metric), values in gathered.speeds.items():
        median, p99 = report.figure(values)
        rows.append(report.Row("tiers", system, "", "", case, 0, concurrency, metric, median, p99, len(values)))
    return rows


def _say_what_is_missing(options: argparse.Namespace) -> None:
    for tool, package in (("fio", "fio"), ("redis-benchmark", "redis-tools"), ("redis-server", "redis-server")):
        if not shutil.which(tool) and not (tool == "redis-server" and options.redis_url):
            _say(f"there is no {tool}: left out; `apt-get install {package}` brings it")
    if not options.lmcache_python:
        _say("no LMCache: left out; name a Python that has it with --lmcache-python")
    elif not _runs_lmcache([str(options.lmcache_python), "-c", "import lmcache.cli.main"]):
        raise HeadstartError(f"--lmcache-python: {options.lmcache_python} can't import LMCache")


def _runs_lmcache(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
