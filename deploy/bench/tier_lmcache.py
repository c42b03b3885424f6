"""LMCache's own benchmark of its backends, `lmcache bench l2`, on the same disk and the same server. It checks no digests."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from cachebus.errors import HeadstartError
from deploy.bench.tier_goals import LMCACHE
from deploy.bench.tier_limits import output_of
from deploy.bench.tier_values import GET, PUT, Load, Subject

_DISK_WORKERS, _REDIS_WORKERS = 4, 8
"""LMCache's defaults."""
_PAGE_BYTES = 4096
BUFFERED = "nvme, page cache"


def subjects(load: Load, folder: Path, python: str, redis: tuple[str, int] | None) -> list[Subject]:
    """Its ``fs`` and ``fs_native`` with O_DIRECT, ``fs`` by default settings (the page cache), and ``resp`` on the server at ``redis``."""
    found = []
    for kind, direct in (("fs", True), ("fs_native", True), ("fs", False)):
        adapter = {"type": kind, "base_path": "", "use_odirect": direct}
        name = LMCACHE if kind == "fs" else f"{LMCACHE} {kind}"
        found.append(_subject(name, "nvme" if direct else BUFFERED, _DISK_WORKERS, load, python, adapter, folder))
    if redis:
        adapter = {"type": "resp", "host": redis[0], "port": redis[1]}
        found.append(_subject(LMCACHE, "redis", _REDIS_WORKERS, load, python, adapter, folder))
    return found


def speeds(text: str, size: int) -> dict[str, float]:
    """Bytes per second of store and load out of its JSON. Raises HeadstartError where keys were not moved.

    Its own figures are in MiB/s of rounded times; the keys and the time that they took say the same without that.
    """
    found = {}
    metrics = json.loads(text)["metrics"]
    for figures in metrics.values():
        metric = {"Store": PUT, "Load": GET}.get(figures.get("operation", ""))
        if metric is None:
            continue
        if figures["rounds_timed_out"] or figures["total_success"] != figures["total_keys"]:
            raise HeadstartError(f"LMCache moved {figures['total_success']} of {figures['total_keys']} keys")
        found[metric] = figures["keys_per_round"] * size / (figures["duration_p50_ms"] / 1000)
    if set(found) != {PUT, GET}:
        raise HeadstartError("LMCache's benchmark says nothing of store and load")
    return found


def _subject(name: str, case: str, workers: int, load: Load, python: str, adapter: dict[str, Any], folder: Path) -> Subject:
    def measure() -> dict[str, float]:
        with tempfile.TemporaryDirectory(prefix="lmcache-", dir=folder) as own:
            placed = {**adapter, "base_path": f"{own}/chunks"} if "base_path" in adapter else adapter
            output = Path(own) / "result.json"
            command = [python, "-c", "from lmcache.cli.main import main; main()", "bench", "l2", "--l2-adapter", json.dumps(placed)]
            command += ["--num-keys", str(load.count), "--data-size-kb", str(load.size // 1024), "--l1-align-bytes", str(_PAGE_BYTES)]
            command += ["--warmup-rounds", "1", "--rounds", "1", "--format", "json", "--output", str(output)]
            output_of(command, {**os.environ, "LMCACHE_TRACK_USAGE": "false"})
            return speeds(output.read_text(), load.size)

    return Subject(name, case, {PUT: workers, GET: workers}, measure, warms_itself=True)
