"""What a soak must not leave behind: requests, leases, extents, open files, memory. Everything is read from outside, as an operator could."""

from __future__ import annotations

import itertools
import json
import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachebus.errors import BusError, RegionError
from cachebus.extents import aligned
from cachebus.region import Region
from cachebus.table import Record, State
from deploy.bench import engines
from deploy.bench.soak_cluster import BUS, SoakCluster
from deploy.launcher import registered
from router import remembered

_QUIET = ("leases", "waiters", "writing", "promoting", "claims", "lent", "unattached_holders", "write_behind_bytes")
"""The bus's counters that are 0 where nobody does anything."""
FILES_GROWN_MAX = 64
MEMORY_GROWN_MAX = 48 << 20
"""Files that a process may have open, and bytes it may take, more at the end than when it counted as warm; a router keeps rendered prompts beside."""


@dataclass(frozen=True)
class Size:
    """A process: open files, and bytes of memory that are its own (shared memory is the region's)."""

    pid: int
    files: int
    memory: int


def size_of(pid: int) -> Size | None:
    """None where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return None
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return Size(pid, files, int(found[1]) << 10) if found else None


def sizes(cluster: SoakCluster) -> dict[str, Size]:
    """Of the bus and each of the router's processes, as far as they are there."""
    named = {f"router {number}": pid for number, pid in enumerate(cluster.router_pids())}
    named |= {BUS: cluster.processes[BUS].pid} if BUS in cluster.processes else {}
    return {name: size for name, pid in named.items() if (size := size_of(pid)) is not None}


def grown(warm: dict[str, Size], now: dict[str, Size]) -> list[str]:
    """Which processes have grown by more than they may; those that were started since are passed over."""
    found = []
    for name, before in warm.items():
        after = now.get(name)
        if after is None or after.pid != before.pid:
            continue
        if after.files - before.files > FILES_GROWN_MAX:
            found.append(f"{name} has {after.files} files open, {before.files} when it was warm")
        if after.memory - before.memory > MEMORY_GROWN_MAX + (0 if name == BUS else remembered.BYTES_MAX):
            found.append(f"{name} takes {after.memory >> 20} MiB, {before.memory >> 20} when it was warm")
    return found


def busy(cluster: SoakCluster) -> list[str]:
    """What is not at rest in router, bus, region and workers; all of it is a leak when nobody has asked anything for a while."""
    try:
        return [*_in_routers(cluster), *_in_workers(cluster), *_in_bus(cluster)]
    except (OSError, BusError, RegionError) as error:
        return [f"can't be looked at: {type(error).__name__}: {error}"]


def _in_routers(cluster: SoakCluster) -> list[str]:
    found = []
    for number, url in enumerate(cluster.admin):
        data: dict[str, Any] = json.loads(_got(f"{url}/console/data"))
        counts = {"requests under way": data["requests"]["under_way"], "requests that wait": data["requests"]["waiting"]}
        counts |= {"flights": data["flights"]["count"]} | {f"legs at {one['worker']}": one["requests"] for one in data["workers"]}
        counts["requests in flight"] = _metric(_got(f"{url}/metrics"), "headstart_requests_in_flight")
        found += [f"router {number} has {count:g} {name}" for name, count in counts.items() if count]
    return found


def _in_workers(cluster: SoakCluster) -> list[str]:
    found = []
    if not cluster.workers_ready():
        found.append("the workers that run are not those that are registered")
    for worker in registered(cluster.run_dir) or ():
        text = _got(f"{worker.url}/metrics")
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
            if value := _metric(text, name):
                found.append(f"{worker.worker}: {name} is {value:g}")
    return found


def _in_bus(cluster: SoakCluster) -> list[str]:
    values = engines.statistics(cluster.run_dir)
    found = [f"the bus has {values[name]:g} {name}" for name in _QUIET if values.get(name)]
    records = _records(cluster.region)
    committed = [record for record in records if record.state is State.COMMITTED]
    found += [f"an extent of {one.length} bytes is {one.state.name}" for one in records if one.state is not State.COMMITTED]
    if len(committed) != values["chunks"] + values["tail_blocks"]:
        found.append(f"{len(committed)} records, {values['chunks']:g} chunks and {values['tail_blocks']:g} tail blocks in the index")
    if (held := sum(aligned(record.length) for record in committed)) != values["dram_bytes"]:
        found.append(f"the records' extents are {held} bytes, the index says {values['dram_bytes']:g}")
    return found + _overlaps(committed)


def _overlaps(records: Sequence[Record]) -> list[str]:
    ordered = sorted(records, key=lambda record: record.offset)
    pairs = itertools.pairwise(ordered)
    twice = len(records) - len({(record.key, record.layout) for record in records})
    return [f"extents at {a.offset} and {b.offset} overlap" for a, b in pairs if a.offset + a.length > b.offset] + (
        [f"{twice} chunks are there twice"] if twice else []
    )


def _records(path: Path) -> list[Record]:
    region = Region.map(path)
    try:
        return [record for _, record in region.table.read()]
    finally:
        region.close()


def _got(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def _metric(text: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))
