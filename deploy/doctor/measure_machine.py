"""The machine: file systems, limits, GPUs."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

from deploy.doctor.facts import LimitFacts, SharedMemoryFacts

_MOUNTS = Path("/proc/self/mountinfo")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def file_system_kind(path: Path, mounts: str | None = None) -> str:
    """The type of the file system on which ``path`` lies, as the kernel names it. ``mounts``: the text of /proc/self/mountinfo."""
    real = Path(os.path.realpath(path))
    best, kind = -1, "unknown"
    for line in (mounts if mounts is not None else _MOUNTS.read_text()).splitlines():
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), before.split()[4]))
        # Of two at one place the later one lies over the other.
        if real.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split()[0]
    return kind


def shared_memory(region: Path) -> SharedMemoryFacts:
    """Where the region lies or would lie."""
    folder = existing(region.parent)
    own = region.stat().st_blocks * 512 if region.exists() else 0
    space = os.statvfs(folder)
    return SharedMemoryFacts(str(folder), file_system_kind(folder), space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize, own)


def limits() -> LimitFacts:
    """This process's limits."""
    files, files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    return LimitFacts(_limit(files), _limit(files_max), _limit(locked), has_gpu)


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value
