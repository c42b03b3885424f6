"""Whether the machine was quiet: the processor time that others took while something was measured."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cachebus.engine import process_tree

FOREIGN_CORES_MAX = 0.15
"""A measurement during which others kept more than that busy was disturbed."""
TRIES_MAX = 3
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """Seconds since some start: of the wall, of all processors at work (or withheld by the host), and of our own processes on them."""

    wall_seconds: float
    busy_seconds: float
    own_seconds: float


def read() -> Reading:
    """The machine now; our own are this process and all below it."""
    own = (os.getpid(), *process_tree.descendants(os.getpid()))
    return Reading(time.monotonic(), busy_seconds(Path("/proc/stat").read_text()), sum(map(process_seconds, _stats_of(own))))


def tree_seconds(pid: int) -> float:
    """Seconds that a process and all below it have worked."""
    return sum(map(process_seconds, _stats_of((pid, *process_tree.descendants(pid)))))


def foreign_cores(before: Reading, after: Reading) -> float:
    """How many processors others kept busy on average between two readings."""
    busy = after.busy_seconds - before.busy_seconds
    own = after.own_seconds - before.own_seconds
    return max(0.0, busy - own) / max(after.wall_seconds - before.wall_seconds, 1e-3)


def quietest(measure: Callable[[int], T], tries_max: int = TRIES_MAX) -> tuple[T, bool]:
    """Measures, and again where others kept the machine busy: what the quietest try gave, and whether that one was disturbed, too.

    ``measure`` is given the try's number, from 0.
    """
    tries: list[tuple[float, T]] = []
    while len(tries) < tries_max and (not tries or tries[-1][0] > FOREIGN_CORES_MAX):
        before = read()
        found = measure(len(tries))
        tries.append((foreign_cores(before, read()), found))
    foreign, found = min(tries, key=lambda one: one[0])
    return found, foreign > FOREIGN_CORES_MAX


def busy_seconds(stat: str) -> float:
    """All processors' work out of the text of /proc/stat: everything but idling and waiting for disks."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_SECOND


def process_seconds(stat: str) -> float:
    """A process's work, and that of its children that have ended, out of the text of its /proc/PID/stat."""
    # The name, in brackets, may hold anything; the fields after it are numbered from 3.
    fields = stat.rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS_PER_SECOND


def _stats_of(pids: Iterable[int]) -> Iterable[str]:
    for pid in pids:
        with contextlib.suppress(OSError):
            yield Path(f"/proc/{pid}/stat").read_text()
