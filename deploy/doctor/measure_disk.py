"""How fast the NVMe tier's disk is: a file of its own, written and read as the tier does, by O_DIRECT in large pieces with several readers.

The file has no name while it is used, so nothing is left of it however this process ends. A disk that has memory of its own, or a virtual one
whose host caches, may look faster than it is.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cachebus.below import DISK_READERS
from deploy.doctor.facts import DiskFacts, DiskSpeed
from deploy.doctor.finding import gigabytes
from deploy.doctor.measure_machine import existing, file_system_kind

FILE_BYTES_MAX = 1 << 30
PIECE_BYTES = 8 << 20
_PASSES = 3
_WRITE_SECONDS_MAX, _PASS_SECONDS_MAX = 10.0, 5.0


def place(folder: Path) -> DiskFacts:
    """What the folder lies on, or will lie on."""
    there = existing(folder)
    space = os.statvfs(there)
    taken = sum(path.stat().st_blocks * 512 for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 0
    return DiskFacts(str(folder), file_system_kind(there), space.f_bavail * space.f_frsize, taken)


def file_bytes(size_max: int, free: int) -> int:
    """How large a file may be: bounded, within the tier's size, and no more than half of what is free."""
    return min(FILE_BYTES_MAX, size_max, free // 2) // PIECE_BYTES * PIECE_BYTES


def speed(folder: Path, size: int) -> DiskSpeed:
    """Writes ``size`` bytes, as many as 10 seconds allow, and reads them."""
    there = existing(folder)
    if not size:
        return DiskSpeed(error=f"{there} has no room for a file of {gigabytes(PIECE_BYTES)} to measure with")
    try:
        descriptor, direct = _nameless(there)
        try:
            size, written = _write(descriptor, size)
            passes = [_read(descriptor, size, direct=direct) for _ in range(_PASSES)]
        finally:
            os.close(descriptor)
    except OSError as error:
        return DiskSpeed(error=f"{there}: {error.strerror}")
    return DiskSpeed(size, statistics.median(passes), written, DISK_READERS, direct)


def _nameless(folder: Path) -> tuple[int, bool]:
    """A new file, and whether it is past the page cache."""
    path = folder / f".headstart-doctor-{os.getpid()}"
    for flag in (os.O_DIRECT, 0):
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | flag, 0o600), bool(flag)
        except OSError as error:
            if error.errno != errno.EINVAL or not flag:
                raise
        finally:
            path.unlink(missing_ok=True)
    raise AssertionError


def _write(descriptor: int, size: int) -> tuple[int, float]:
    """How many bytes were written, and how fast."""
    with mmap.mmap(-1, PIECE_BYTES) as piece:
        # Not to be compressed.
        piece[:] = os.urandom(PIECE_BYTES)
        started = time.perf_counter()
        offset = 0
        while offset < size and time.perf_counter() - started < _WRITE_SECONDS_MAX:
            if os.pwrite(descriptor, piece, offset) != PIECE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            offset += PIECE_BYTES
        os.fdatasync(descriptor)
        return offset, offset / (time.perf_counter() - started)


def _read(descriptor: int, size: int, *, direct: bool) -> float:
    """Bytes per second of all readers together, who go through the file side by side."""
    if not direct:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    pieces = itertools.count()
    started = time.perf_counter()

    def read() -> int:
        moved = 0
        with mmap.mmap(-1, PIECE_BYTES) as piece:
            while (offset := next(pieces) * PIECE_BYTES) < size and time.perf_counter() - started < _PASS_SECONDS_MAX:
                moved += os.preadv(descriptor, [piece], offset)
        return moved

    with ThreadPoolExecutor(DISK_READERS) as pool:
        running = [pool.submit(read) for _ in range(DISK_READERS)]
        moved = sum(each.result() for each in running)
    return moved / (time.perf_counter() - started)
