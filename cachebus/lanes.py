"""The threads that move bytes between the region and one lower tier. The daemon's thread starts jobs and takes outcomes; it never waits.

Some of a lane's threads do nothing but what somebody waits for (reads and probes), so that a tier which is slow to write does not hold them up;
the others make room first, then write behind.
Bytes that come up are checked here, against the header that was asked for and their keyed digest, before anybody is told of them.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from blake3 import blake3

from cachebus.chunk import ChunkHeader
from cachebus.effects import Held, Job, Outcome, Probe, Read, Wipe, Write
from cachebus.errors import TierError
from cachebus.extents import aligned
from cachebus.messages import Event
from cachebus.sealing import Sealer
from cachebus.table import Record
from cachebus.wire import Tier
from cachebus.zeromq_peers import PeerAddress

log = logging.getLogger("headstart.cachebus")

SYNC_SECONDS = 5.0
_PRIORITY = {Probe: 0, Read: 0, Wipe: 0, Write: 1}
_LAST = 9


class DiskStore(Protocol):
    """The NVMe tier's files (``cachebus.disk``). ``writable``: whether writing makes sense now."""

    @property
    def writable(self) -> bool: ...

    def write(self, slot: int, record: Record, header: ChunkHeader, payload: memoryview) -> None:
        """Writes header, payload and, after them, the record."""

    def wipe(self, slot: int) -> None:
        """Frees a record."""

    def read(self, offset: int, length: int, into: memoryview) -> ChunkHeader | None:
        """Reads a chunk's payload and returns the header found before it."""

    def sync(self) -> None:
        """Asks the device to keep what was written."""

    def close(self) -> None:
        """Closes the files."""


class Digesting:
    """The digest of a chunk, taken piece by piece as they arrive: then each is still in the processor's caches, and memory is read once less."""

    def __init__(self, key: bytes) -> None:
        self._hasher = blake3(key=key)

    def take(self, piece: memoryview) -> None:
        """Adds the next bytes."""
        self._hasher.update(piece)

    def gives(self, digest: bytes) -> bool:
        """Whether that is the digest of all that was taken."""
        return bool(self._hasher.digest() == digest)


@dataclass(frozen=True)
class Memory:
    """The region's bytes, the key of its digests and, where tiers below it are encrypted, what does that."""

    data: memoryview
    digest_key: bytes
    sealer: Sealer | None = None

    def extent(self, offset: int, length: int) -> memoryview:
        """The bytes of an extent; the page that it ends in is its own, so ``length`` may be rounded up to pages."""
        return self.data[offset : offset + length]

    def digesting(self) -> Digesting:
        """For a chunk that is about to arrive."""
        return Digesting(self.digest_key)


Jobs = queue.PriorityQueue[tuple[int, int, Job | None]]


class Lane:
    """A tier's queues and threads. ``wake`` is called, from a thread of the lane, when an outcome can be taken.

    ``usable`` and ``writable`` say whether jobs make sense now.
    """

    tier: Tier
    probers = 0
    """Threads for probes alone; 0: those that read do them, too."""

    def __init__(self, memory: Memory, readers: int, writers: int, wake: Callable[[], None]) -> None:
        self._memory, self._wake = memory, wake
        self._reads, self._later = Jobs(), Jobs()
        self._probes = Jobs() if self.probers else self._reads
        self._order = itertools.count()
        self._outcomes: queue.SimpleQueue[tuple[int, Outcome]] = queue.SimpleQueue()
        self._held: queue.SimpleQueue[Held] = queue.SimpleQueue()
        self._ending = threading.Event()
        work = [*[self._probes] * self.probers, *[self._reads] * readers, *[self._later] * writers]
        self._threads = [threading.Thread(target=self._work, args=[jobs], name=f"headstart-{self.tier}", daemon=True) for jobs in work]
        self._threads.append(threading.Thread(target=self._upkeep, name=f"headstart-{self.tier}-upkeep", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def usable(self) -> bool:
        """Whether chunks can be had from the tier."""
        raise NotImplementedError

    @property
    def writable(self) -> bool:
        """Whether chunks can be written to it."""
        raise NotImplementedError

    def start(self, job: Job) -> None:
        """Queues a job."""
        jobs = self._probes if isinstance(job, Probe) else self._reads if isinstance(job, Read) else self._later
        jobs.put((_PRIORITY[type(job)], next(self._order), job))

    def outcomes(self) -> Iterator[tuple[int, Outcome]]:
        """What ended since the last call, by job number."""
        yield from taken(self._outcomes)

    def held(self) -> Iterator[Held]:
        """What is known anew of the tier since the last call."""
        yield from taken(self._held)

    def news(self) -> Iterator[tuple[str, Event]]:
        """What other nodes said of their workers since the last call, with the node's name."""
        return iter(())

    def keepers(self) -> dict[str, tuple[bytes, PeerAddress]]:
        """The nodes that are heard and keep claims for others: who each is among those, and where."""
        return {}

    def distances(self) -> dict[str, float]:
        """Seconds of a round trip, by the name of who is asked."""
        return {}

    def share(self, shares: Mapping[bytes, float]) -> None:
        """From now on these tenants may take these shares of the tier, as far as its lane looks after that: a shelf has its own."""

    def close(self, seconds_max: float) -> None:
        """Does what is queued, for so long at most, and ends the threads."""
        self._ending.set()
        for _ in self._threads:
            for jobs in (self._probes, self._reads, self._later):
                jobs.put((_LAST, next(self._order), None))
        deadline = time.monotonic() + seconds_max
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self, jobs: Jobs) -> None:
        while (job := jobs.get()[2]) is not None:
            for done, outcome in self._finish(job, jobs):
                if done.number:
                    self._outcomes.put((done.number, outcome))
                    self._wake()

    def _finish(self, job: Job, jobs: Jobs) -> Iterator[tuple[Job, Outcome]]:
        """Does a job, and those of ``jobs`` that are done together with it; each outcome comes as soon as it is known."""
        together = [job, *self._along_with(job, jobs)]
        try:
            outcomes = self._do(together)
        except (OSError, TierError) as error:
            log.debug("%s: %s failed: %s", self.tier, type(job).__name__.lower(), error)
            outcomes = [Outcome(False)] * len(together)
        yield from zip(together, outcomes, strict=True)

    def _along_with(self, job: Job, jobs: Jobs) -> list[Job]:
        """Takes jobs that are done together with ``job``."""
        return []

    def _do(self, together: Sequence[Job]) -> list[Outcome]:
        """Does jobs that were taken together, one at least."""
        return [self._do_one(job) for job in together]

    def _do_one(self, job: Job) -> Outcome:
        raise NotImplementedError

    def _upkeep(self) -> None:
        raise NotImplementedError

    def _checked(self, job: Read, found: ChunkHeader | None, digesting: Digesting) -> Outcome:
        """Whether a chunk that was read, and its bytes taken by ``digesting``, is the one that was asked for."""
        wanted = job.header
        same = found is not None and (found.key, found.layout, found.length, found.digest) == (
            wanted.key,
            wanted.layout,
            wanted.length,
            wanted.digest,
        )
        good = same and digesting.gives(wanted.digest)
        if not good:
            log.error("chunk %s from %s is not what was written there: it will be computed again", wanted.key.hex()[:16], self.tier)
        return Outcome(good, corrupt=not good)


class DiskLane(Lane):
    """The NVMe tier."""

    tier: Tier = "nvme"

    def __init__(self, disk: DiskStore, memory: Memory, readers: int, writers: int, wake: Callable[[], None]) -> None:
        self._disk = disk
        self._wiping: set[int] = set()
        self._lock = threading.Lock()
        super().__init__(memory, readers, writers, wake)

    @property
    def usable(self) -> bool:
        return True

    @property
    def writable(self) -> bool:
        return self._disk.writable

    def start(self, job: Job) -> None:
        with self._lock:
            if isinstance(job, Wipe):
                self._wiping.update(job.slots)
            elif isinstance(job, Write):
                # Its own record takes the old one's place; a wipe that came after it would forget the new chunk.
                self._wiping.discard(job.slot)
        super().start(job)

    def close(self, seconds_max: float) -> None:
        super().close(seconds_max)
        if not any(thread.is_alive() for thread in self._threads):
            self._disk.close()

    def _do_one(self, job: Job) -> Outcome:
        length = job.header.length if isinstance(job, Read | Write) else 0
        if isinstance(job, Read):
            into = self._memory.extent(job.into, aligned(length))
            sealer = self._memory.sealer
            found = self._disk.read(job.place, length, sealer.buffer(length) if sealer else into)
            if sealer and found and not sealer.open(found, sealer.buffer(length)[:length], into):
                found = None
            digesting = self._memory.digesting()
            digesting.take(into[:length])
            return self._checked(job, found, digesting)
        if isinstance(job, Write):
            assert job.record is not None
            header, payload = job.header, self._memory.extent(job.source, aligned(length))
            if self._memory.sealer:
                header, _ = self._memory.sealer.seal(header, payload[:length])
                payload = self._memory.sealer.buffer(length)
            self._disk.write(job.slot, job.record, header, payload)
        elif isinstance(job, Wipe):
            self._wipe(job.slots)
        return Outcome(True)

    def _wipe(self, slots: Iterable[int]) -> None:
        for slot in slots:
            with self._lock:
                if slot in self._wiping:
                    self._wiping.discard(slot)
                    self._disk.wipe(slot)

    def _upkeep(self) -> None:
        while not self._ending.wait(SYNC_SECONDS):
            try:
                self._disk.sync()
            except OSError as error:
                log.warning("nvme: the device does not keep what was written: %s", error)


_T = TypeVar("_T")


def taken(items: queue.SimpleQueue[_T]) -> Iterator[_T]:
    """All that is in the queue now."""
    while True:
        try:
            yield items.get_nowait()
        except queue.Empty:
            return
