"""``headstart bench index``: chunks of prompts that a router looks up in a second, on one core, in an index that is full.

The index is the router's own (``cachebus.replica``), filled through the events that a bus sends. Each prompt is another place in it, so
nothing that was looked up before helps.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cachebus.codec import PROTOCOL_VERSION, EventBatch
from cachebus.errors import SettingsError
from cachebus.messages import Event, SnapshotReply, Stored
from cachebus.messages_hbm import HbmChanged
from cachebus.replica import Replica
from deploy.bench import report
from router.costs import NEAREST_FIRST

LOOKUPS, BYTES = "lookups_per_second", "bytes_per_chunk"
_KEY_BYTES, _EVENT_KEYS, _PROMPTS, _HBM_SHARE = 32, 1000, 500, 0.01
_SEED = 1

Prompt = Sequence[bytes]


def run(options: argparse.Namespace) -> int:
    """Measures, prints a table or one JSON object. Raises SettingsError."""
    if not 0 < options.prompt_chunks <= options.chunks or min(options.runs, options.workers) < 1:
        raise SettingsError("give at least one chunk, worker and run, and no prompt longer than the index")
    before = _resident_bytes()
    keys, replica = filled(options.chunks, options.workers)
    grown = _resident_bytes() - before
    places = random.Random(_SEED)

    def prompts() -> list[Prompt]:
        starts = [places.randrange(options.chunks - options.prompt_chunks + 1) for _ in range(_PROMPTS)]
        return [keys[start : start + options.prompt_chunks] for start in starts]

    kinds: dict[str, Callable[[Prompt], object]] = {
        "tiers": lambda prompt: replica.nearest_tiers(prompt, NEAREST_FIRST),
        f"HBM of {options.workers} workers": replica.hbm_prefixes,
    }
    rows = [_row(case, LOOKUPS, [_speed(look, prompts()) for _ in range(options.runs)], options.chunks) for case, look in kinds.items()]
    rows.append(_row("index", BYTES, [grown / options.chunks], options.chunks))
    result = report.document(rows, ["headstart", "bench", "index", *sys.argv[sys.argv.index("index") + 1 :]] if "index" in sys.argv else [], {})
    if options.output:
        report.write(options.output, result)
    print(json.dumps(result) if options.json else _table(rows, options.prompt_chunks))
    return 0


def filled(chunks: int, workers: int) -> tuple[list[bytes], Replica]:
    """An index of so many chunks, all in DRAM and half of them on disk too, a hundredth in the HBM of each worker; and its keys."""
    source = random.Random(_SEED)
    keys = [source.randbytes(_KEY_BYTES) for _ in range(chunks)]
    replica = Replica()
    replica.load(SnapshotReply(1, 0, {}, []))
    parts = [keys[start : start + _EVENT_KEYS] for start in range(0, chunks, _EVENT_KEYS)]
    held = max(1, int(_HBM_SHARE * chunks))
    events: list[Event] = [Stored(part) for part in parts]
    events += [Stored(part, "nvme") for part in parts[::2]]
    events += [HbmChanged(f"decode-{number}", keys[number * held % chunks :][:held], [], whole=True) for number in range(workers)]
    for number, event in enumerate(events):
        assert replica.apply(EventBatch(PROTOCOL_VERSION, 1, number + 1, [event]))
    return keys, replica


def _speed(look: Callable[[Prompt], object], prompts: Sequence[Prompt]) -> float:
    started = time.perf_counter()
    for prompt in prompts:
        look(prompt)
    return sum(map(len, prompts)) / (time.perf_counter() - started)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _row(case: str, metric: str, values: Sequence[float], chunks: int) -> report.Row:
    return report.Row("index", "headstart", "", "", f"{case}, {chunks:,} chunks", 0, 1, metric, *report.figure(values), len(values))


def _table(rows: Sequence[report.Row], prompt_chunks: int) -> str:
    lines = ["| | chunks a second | a prompt, µs |", "|---|---|---|"]
    lines += [f"| {row.case} | {row.median:,.0f} | {1e6 * prompt_chunks / row.median:.0f} |" for row in rows if row.metric == LOOKUPS]
    return "\n".join([*lines, *(f"\n{row.median:.0f} bytes for each chunk of the index" for row in rows if row.metric == BYTES)])
