"""What a benchmark leaves behind: rows, as JSON and as a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec


class Row(msgspec.Struct, frozen=True):
    """One figure: the median and 99th percentile of ``runs`` measurements. ``tokens`` is the prompt's length.

    ``concurrency`` 0: requests arrive at times of their own.
    """

    bench: str
    system: str
    model: str
    kv_dtype: str
    case: str
    tokens: int
    concurrency: int
    metric: str
    median: float
    p99: float
    runs: int


def figure(values: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile; of fewer than a hundred values the latter is the largest."""
    ordered = sorted(values)
    return round(statistics.median(ordered), 4), round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 4)


def document(rows: Sequence[Row], command: Sequence[str], host: Mapping[str, Any]) -> dict[str, Any]:
    """The whole result with what it was measured on; ``host`` adds to what is known of the machine anyway."""
    return {"host": {**_host(), **host}, "commit": _commit(), "command": " ".join(command), "rows": [msgspec.to_builtins(row) for row in rows]}


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def table(rows: Sequence[Row], unit: str) -> str:
    """Medians by case (rows) and prompt length (columns), in Markdown."""
    lengths = sorted({row.tokens for row in rows})
    cases = list(dict.fromkeys((row.system, row.case) for row in rows))
    found = {(row.system, row.case, row.tokens): row.median for row in rows}
    lines = [f"| {unit} | " + " | ".join(f"{length:,}" for length in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for system, case in cases:
        cells = [f"{found[system, case, length]:.3f}" if (system, case, length) in found else "-" for length in lengths]
        lines.append(f"| {system}, {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _host() -> dict[str, Any]:
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count(), "memory_bytes": memory, "kernel": platform.release()}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"
