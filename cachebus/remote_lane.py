"""The shared tier's lane: its threads, its upkeep, and what is known of it."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from cachebus.chunk import ChunkHeader, Taken
from cachebus.effects import Held, Job, Outcome, Probe, Read, Wipe, Write
from cachebus.errors import TierError
from cachebus.lanes import Jobs, Lane, Memory
from cachebus.redis_shares import Shares
from cachebus.turns import Turns
from cachebus.wire import Tier

log = logging.getLogger("headstart.cachebus")

UPKEEP_SECONDS = 0.25
SCAN_SECONDS = 30.0
"""How old the index of the shared tier may get."""
LOOKED_AT_ONCE = 256
"""Headers that are read in one go where a tenant's chunks are looked for."""
TOGETHER_BYTES = 32 << 20
"""How much is written to the shared tier in one go. Between two goes server and writer wait for each other."""


class RemoteStore(Protocol):
    """The shared tier (``cachebus.redis``). ``available``: whether it answers. ``shares``: what tenants have there."""

    @property
    def available(self) -> bool: ...

    @property
    def shares(self) -> Shares: ...

    def probe(self, keys: Sequence[bytes]) -> list[ChunkHeader | None]:
        """The headers under these keys."""

    def get(self, header: ChunkHeader, into: memoryview, taken: Taken = ...) -> ChunkHeader | None:
        """Reads a chunk's payload and returns the header before it; None where it is not there as the header says. ``taken``: see ``Taken``."""

    def put_all(self, chunks: Sequence[tuple[ChunkHeader, memoryview]]) -> list[bool]:
        """Stores chunks, headers with payloads; False for each that the tier refuses."""

    def delete(self, keys: Sequence[bytes]) -> int:
        """Forgets chunks."""

    def clear(self) -> int:
        """Forgets all chunks of this cluster."""

    def scan(self) -> Iterator[bytes]:
        """Every key."""

    def ping(self) -> float:
        """Seconds of a round trip."""

    def tick(self) -> bool:
        """Tries to reconnect where that is due; True when the tier has just come back."""


class RemoteLane(Lane):
    """The shared tier."""

    tier: Tier = "redis"
    # A lookup waits for its probes; behind the reads that the first of them began they would come too late.
    probers = 1

    def __init__(self, remote: RemoteStore, memory: Memory, readers: int, writers: int, wake: Callable[[], None]) -> None:
        self._remote = remote
        self._known = False
        self._written: set[bytes] = set()
        self._scan_at = 0.0
        self._round_trip = 0.0
        self._turns = Turns()
        super().__init__(memory, readers, writers, wake)

    @property
    def usable(self) -> bool:
        return self._remote.available

    @property
    def writable(self) -> bool:
        return self._remote.available

    def distances(self) -> dict[str, float]:
        return {self.tier: self._round_trip}

    def share(self, shares: Mapping[bytes, float]) -> None:
        self._remote.shares.share(shares)
        # Accounts are read with the next look at all.
        self._scan_at = 0.0

    def start(self, job: Job) -> None:
        if isinstance(job, Wipe | Write):
            self._turns.asked(job)
        super().start(job)

    def _along_with(self, job: Job, jobs: Jobs) -> list[Job]:
        found: list[Job] = []
        # What is sealed is sealed into one buffer, and what waits for a wipe holds up no other.
        if not isinstance(job, Write) or self._memory.sealer or not self._turns.is_next(job):
            return found
        left = TOGETHER_BYTES - job.header.length
        while left > 0:
            try:
                entry = jobs.get_nowait()
            except queue.Empty:
                break
            if not isinstance(entry[2], Write) or not self._turns.is_next(entry[2]):
                jobs.put(entry)
                break
            found.append(entry[2])
            left -= entry[2].header.length
        return found

    def _do(self, together: Sequence[Job]) -> list[Outcome]:
        writes = [job for job in together if isinstance(job, Write)]
        return self._write(writes) if writes else super()._do(together)

    def _write(self, jobs: Sequence[Write]) -> list[Outcome]:
        sealer = self._memory.sealer
        with contextlib.ExitStack() as turns:
            for job in jobs:
                turns.enter_context(self._turns.writing(job))
            chunks = [(job.header, self._memory.extent(job.source, job.header.length)) for job in jobs]
            stored = self._remote.put_all([sealer.seal(*chunk) for chunk in chunks] if sealer else chunks)
        self._written.update(job.header.key for job, taken in zip(jobs, stored, strict=True) if taken)
        return [Outcome(taken) for taken in stored]

    def _do_one(self, job: Job) -> Outcome:
        sealer = self._memory.sealer
        if isinstance(job, Read):
            into = self._memory.extent(job.into, job.header.length)
            digesting = self._memory.digesting()
            if sealer is None:
                found = self._remote.get(job.header, into, digesting.take)
                return self._checked(job, found, digesting) if found else Outcome(False)
            sealed = sealer.buffer(len(into))[: len(into)]
            found = self._remote.get(job.header, sealed)
            if found is None:
                return Outcome(False)
            opened = sealer.open(found, sealed, into)
            digesting.take(into)
            return self._checked(job, found if opened else None, digesting)
        if isinstance(job, Probe):
            return Outcome(True, headers=self._remote.probe(job.keys))
        if isinstance(job, Wipe):
            with self._turns.wiping(job):
                if job.tenant:
                    self._wipe_tenant(job.tenant)
                elif job.keys:
                    self._remote.delete(job.keys)
                else:
                    self._remote.clear()
        return Outcome(True)

    def _wipe_tenant(self, tenant: bytes) -> None:
        """Only a chunk's header says whose it is."""
        try:
            keys = list(self._remote.scan())
            for start in range(0, len(keys), LOOKED_AT_ONCE):
                headers = self._remote.probe(keys[start : start + LOOKED_AT_ONCE])
                self._remote.delete([header.key for header in headers if header is not None and header.tenant == tenant])
            self._remote.shares.forget(tenant)
        except (OSError, TierError):
            log.error("redis: not all chunks of a tenant could be deleted: clear its cache again once the tier answers")
            raise
        finally:
            # What is left is found by a look at all.
            self._scan_at = 0.0

    def _upkeep(self) -> None:
        while not self._ending.wait(UPKEEP_SECONDS if self._known else 0.01):
            try:
                came_back = self._remote.tick()
                if not self._remote.available:
                    continue
                self._round_trip = self._remote.ping()
                if came_back or not self._known or time.monotonic() >= self._scan_at:
                    self._scan()
                if removed := self._remote.shares.keep():
                    self._held.put(Held("redis", removed=removed))
                    self._wake()
            except (OSError, TierError) as error:
                self._known = False
                log.debug("redis: %s", error)

    def _scan(self) -> None:
        started = time.monotonic()
        # What is written while the scan goes on may have been passed over by it.
        self._written = set()
        self._scan_at = math.inf
        found = set(self._remote.scan())
        self._held.put(Held("redis", found | self._written, whole=True))
        self._known = True
        self._wake()
        self._remote.shares.mend(found, self._remote.probe)
        # Other nodes write there, too. A long scan is not repeated as soon as a short one; one that was asked for meanwhile comes at once.
        self._scan_at = min(self._scan_at, time.monotonic() + max(SCAN_SECONDS, 20 * (time.monotonic() - started)))
