"""Headstart's own tiers as the daemon uses them: jobs into the lanes' queues, their threads at the default number, a real region, digests checked."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from cachebus.below import DISK_READERS, DISK_WRITERS, HEADER_PAGE_BYTES, Below, remote_writers
from cachebus.chunk import ChunkHeader, key_id
from cachebus.effects import Job, Read, Write
from cachebus.errors import HeadstartError
from cachebus.extents import aligned
from cachebus.lanes import Digesting, Memory
from cachebus.region import PAGE_BYTES, Region
from cachebus.settings import CacheSettings, SecuritySettings
from cachebus.table import Record, State
from cachebus.wire import Tier
from deploy.bench.tier_goals import OURS, UNCHECKED
from deploy.bench.tier_values import GET, PATIENCE_MS, PUT, Load, Subject, fill, key

LAYOUT = b"l" * 16
DIGEST_KEY = b"k" * 32
_SECONDS_MAX = 120.0
_START_SECONDS_MAX = 10.0
_SPARE_BYTES = 64 << 20


class _Unchecked(Digesting):
    def take(self, piece: memoryview) -> None:
        pass

    def gives(self, digest: bytes) -> bool:
        return True


@dataclass(frozen=True)
class _Memory(Memory):
    """Memory that can be told not to check, which shows what checking costs."""

    unchecked: threading.Event = field(default_factory=threading.Event)

    def digesting(self) -> Digesting:
        return _Unchecked(self.digest_key) if self.unchecked.is_set() else super().digesting()


class Lanes:
    """The lanes over a region whose first half holds the chunks of ``load`` and whose second half they are read into."""

    def __init__(self, load: Load, region: Region, cache: CacheSettings) -> None:
        self._load, self._data = load, region.data
        self._woken = threading.Event()
        self._memory = _Memory(region.data, DIGEST_KEY)
        fill(region.data, load)
        digests = [self._digest(number * load.size) for number in range(load.count)]
        name = key_id(DIGEST_KEY)
        self._headers = [ChunkHeader(key(number), LAYOUT, digest, load.size, name) for number, digest in enumerate(digests)]
        self._below = Below.open(cache, SecuritySettings(), self._memory, self._woken.set)
        self._wanted: set[Tier] = {"redis"} if cache.remote_url else set()

    def wait_until_usable(self) -> None:
        """Returns once all tiers answer. Raises HeadstartError where one does not."""
        deadline = time.monotonic() + _START_SECONDS_MAX
        while not self._wanted <= self._below.tiers.usable:
            self._below.changes()
            if time.monotonic() > deadline:
                raise HeadstartError("the shared tier does not answer")
            time.sleep(0.02)

    def measure(self, tier: Tier, *, checked: bool = True) -> dict[str, float]:
        """Writes all chunks to a tier and reads them back. Raises HeadstartError where one does not come back as it was."""
        found = {} if not checked else {PUT: self._timed([self._write(tier, number) for number in range(self._load.count)])}
        for number in range(self._load.count):
            # What an earlier measurement left there would pass for what was read.
            self._data[self._target(number) : self._target(number) + PAGE_BYTES] = bytes(PAGE_BYTES)
        if not checked:
            self._memory.unchecked.set()
        try:
            return found | {GET: self._timed([self._read(tier, number) for number in range(self._load.count)])}
        finally:
            self._memory.unchecked.clear()

    def measure_dram(self) -> dict[str, float]:
        """What a worker's thread does with each chunk: copies it into the region and digests it; copies it out and checks it."""
        own = memoryview(bytearray(self._load.total))
        fill(own, self._load)
        size = self._load.size
        places = [number * size for number in range(self._load.count)]
        started = time.perf_counter()
        for place in places:
            self._data[place : place + size] = own[place : place + size]
            self._digest(place)
        put = time.perf_counter() - started
        started = time.perf_counter()
        for place, header in zip(places, self._headers, strict=True):
            own[place : place + size] = self._data[place : place + size]
            if blake3(own[place : place + size], key=DIGEST_KEY).digest() != header.digest:
                raise HeadstartError("a chunk in DRAM is not what was put there")
        return {PUT: self._load.total / put, GET: self._load.total / (time.perf_counter() - started)}

    def measure_memcpy(self) -> dict[str, float]:
        """The same copies alone."""
        own = memoryview(bytearray(self._load.total))
        fill(own, self._load)
        size = self._load.size
        seconds = []
        for to, source in ((self._data, own), (own, self._data)):
            started = time.perf_counter()
            for number in range(self._load.count):
                to[number * size : (number + 1) * size] = source[number * size : (number + 1) * size]
            seconds.append(time.perf_counter() - started)
        return {PUT: self._load.total / seconds[0], GET: self._load.total / seconds[1]}

    def close(self) -> None:
        """Ends the threads and lets go of the region."""
        self._below.close()
        self._data.release()

    def _timed(self, jobs: Sequence[Job]) -> float:
        started = time.perf_counter()
        for job in jobs:
            self._below.start(job)
        left, failed = len(jobs), 0
        while left:
            if time.perf_counter() - started > _SECONDS_MAX:
                raise HeadstartError(f"{left} of {len(jobs)} chunks were not moved within {_SECONDS_MAX:g} s")
            self._woken.wait(1)
            self._woken.clear()
            outcomes = [outcome for _, outcome in self._below.outcomes()]
            left -= len(outcomes)
            failed += sum(not outcome.good for outcome in outcomes)
        if failed:
            # All have ended: none of them is left to be taken for one of the next measurement's.
            raise HeadstartError(f"{failed} of {len(jobs)} chunks: {type(jobs[0]).__name__.lower()} on {jobs[0].tier} failed")
        return self._load.total / (time.perf_counter() - started)

    def _write(self, tier: Tier, number: int) -> Write:
        header, place = self._headers[number], self._place(number)
        record = Record(State.COMMITTED, 1, place, header.length, False, header.key, header.digest, LAYOUT, "")
        return Write(number + 1, tier, header, number * self._load.size, number, record)

    def _read(self, tier: Tier, number: int) -> Read:
        return Read(number + 1, tier, self._headers[number], self._target(number), self._place(number))

    def _target(self, number: int) -> int:
        return self._load.total + number * self._load.size

    def _place(self, number: int) -> int:
        return number * (HEADER_PAGE_BYTES + aligned(self._load.size))

    def _digest(self, offset: int) -> bytes:
        return blake3(self._memory.extent(offset, self._load.size), key=DIGEST_KEY).digest()


@contextlib.contextmanager
def subjects(load: Load, folder: Path, redis_url: str) -> Iterator[list[Subject]]:
    """DRAM, NVMe in ``folder`` and, where ``redis_url`` is not "", Redis, each checked and, as a diagnosis, read unchecked."""
    disk_size = (1.1 * load.total + _SPARE_BYTES) / 1e9
    cache = CacheSettings(local_disk=str(folder), max_local_disk_size=disk_size, remote_url=redis_url, remote_timeout_ms=PATIENCE_MS)
    tiers: dict[Tier, dict[str, int]] = {"nvme": {PUT: DISK_WRITERS, GET: DISK_READERS}}
    if redis_url:
        tiers["redis"] = {PUT: remote_writers(cache), GET: cache.remote_connections}
    with shared_memory() as path:
        region = Region.make_or_adopt(path, 2 * load.total + _SPARE_BYTES, may_replace=True)
        lanes = Lanes(load, region, cache)
        try:
            lanes.wait_until_usable()
            found = [Subject(OURS, "dram", {PUT: 1, GET: 1}, lanes.measure_dram)]
            for tier, threads in tiers.items():
                found.append(Subject(OURS, tier, threads, lambda tier=tier: lanes.measure(tier)))  # type: ignore[misc]
                found.append(Subject(UNCHECKED, tier, threads, lambda tier=tier: lanes.measure(tier, checked=False)))  # type: ignore[misc]
            yield [*found, Subject("memcpy", "dram", {PUT: 1, GET: 1}, lanes.measure_memcpy)]
        finally:
            lanes.close()
            region.close()


@contextlib.contextmanager
def shared_memory() -> Iterator[Path]:
    """A path for a region in memory, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="headstart-bench-", dir="/dev/shm") as folder:
        os.chmod(folder, 0o700)
        yield Path(folder) / "region"
