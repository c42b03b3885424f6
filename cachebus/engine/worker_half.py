"""The connector's worker half: moves bytes between the engine's blocks and the region.

Neither direction holds up the engine. Pulls run on a thread of their own, in the order in which they were asked for, and are
checked where they arrived. Publishing runs on another while the engine hands over the step's tokens and begins the next step: the
extents are asked for before the forward pass and are there when it ends. The engine waits for it only before a step that
writes the blocks being copied, and at the end of the next forward pass.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cachebus.client import BusClient
from cachebus.engine.blocks import Blocks, Computed
from cachebus.engine.transfer import Load, LoadPiece, Save, StepPlan
from cachebus.errors import BusError
from cachebus.holder import Holder
from cachebus.messages import Abandon, Commit, NewEntry, Quarantine, Release, Reserve, Reserved, Slot, WrittenEntry
from cachebus.region import Region

log = logging.getLogger("headstart.connector")

RESERVE_WAIT_MS_MAX = 20
"""How long a step's extents are waited for after the forward pass; past it the step's chunks are not published."""

IDLE_WAIT_SECONDS = 0.005
"""How long an engine with nothing to compute waits for a load to end, instead of asking again a step later."""

COPY_THREADS_MAX = 4
"""Threads that share one pull; two reach twice the speed of one, and more than four would take memory bandwidth from the engine."""

CONNECT_MS_MAX = 5000
SILENT_SECONDS = 1.0


class Mover(threading.Thread):
    """Carries out loads. ``take_finished`` hands over what has ended since the last call, each request once."""

    def __init__(self, run_dir: Path, holder: Holder, worker: str, blocks: Blocks, region: Region, verify: bool) -> None:
        super().__init__(name="headstart-mover", daemon=True)
        self._blocks, self._region = blocks, region
        self._loads: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._reading: dict[int, list[int]] = {}
        self._finished: set[str] = set()
        self._invalid: set[int] = set()
        self.counts: dict[str, float] = {"pulled_bytes": 0, "pulled_chunks": 0, "pull_seconds": 0, "integrity_failures": 0}
        self._client = BusClient(run_dir, f"{worker} mover", holder)
        digest_key = self._client.connect(CONNECT_MS_MAX).digest_key
        self._key = digest_key if verify else None
        self._copiers = ThreadPoolExecutor(min(COPY_THREADS_MAX, len(os.sched_getaffinity(0))), "headstart-copier")

    def submit(self, load: Load) -> None:
        """Queues a load; every load that was queued is reported finished once."""
        with self._changed:
            self._reading[load.lease] = [piece.offset for piece in load.pieces]
        self._loads.put(load)

    def take_finished(self, wait_seconds: float) -> tuple[set[str], set[int]]:
        """Requests whose loads ended, and the blocks among them whose bytes are not good.

        Where loads are under way and none has ended, waits for one to end, ``wait_seconds`` at most.
        """
        with self._changed:
            if wait_seconds:
                self._changed.wait_for(lambda: self._finished or not self._reading, wait_seconds)
            finished, self._finished = self._finished, set()
            invalid, self._invalid = self._invalid, set()
        return finished, invalid

    def reading(self) -> dict[int, list[int]]:
        """The extents that loads still read, by lease."""
        with self._changed:
            return dict(self._reading)

    def stop(self) -> None:
        """Ends the thread after the loads that are queued."""
        self._loads.put(None)
        self.join(timeout=5)

    def run(self) -> None:
        while (load := self._loads.get()) is not None:
            started = time.perf_counter()
            good = self._copiers.map(self._pull, load.pieces) if len(load.pieces) > 1 else map(self._pull, load.pieces)
            bad = [piece for piece, is_good in zip(load.pieces, good, strict=True) if not is_good]
            self.counts["pulled_bytes"] += sum(piece.length for piece in load.pieces)
            self.counts["pulled_chunks"] += len(load.pieces)
            self.counts["pull_seconds"] += time.perf_counter() - started
            for piece in bad:
                self.counts["integrity_failures"] += 1
                log.error("chunk %s does not match its digest: it is computed again", piece.key.hex()[:16])
                self._client.submit(Quarantine(piece.key, piece.digest))
            self._client.submit(Release([load.lease]))
            with self._changed:
                self._reading.pop(load.lease, None)
                self._finished.add(load.request_id)
                self._invalid.update(block for piece in bad for block in piece.blocks if block >= 0)
                self._changed.notify()
            self._client.poll()
        self._copiers.shutdown()
        self._client.close()

    def _pull(self, piece: LoadPiece) -> bool:
        extent = self._region.data[piece.offset : piece.offset + piece.length]
        return self._blocks.load(piece.blocks, extent, self._key) == (piece.digest if self._key else b"")


class Publisher:
    """Writes complete chunks into the region. The engine's thread calls it; its own thread talks to the bus and copies."""

    def __init__(self, run_dir: Path, holder: Holder, worker: str, layout: bytes, blocks: Blocks, region: Region) -> None:
        self._holder, self._layout, self._blocks, self._region = holder, layout, blocks, region
        self._thread = ThreadPoolExecutor(1, "headstart-publisher")
        self._copying: Future[None] | None = None
        self._saves: dict[bytes, Save] = {}
        self._ticket = 0
        self.writing: list[int] = []
        self._silent_until = 0.0
        self.counts: dict[str, float] = {"published_bytes": 0, "published_chunks": 0, "publish_seconds": 0, "unpublished_chunks": 0}
        self._thread.submit(self._connect, run_dir, worker).result()

    def begin(self, plan: StepPlan) -> None:
        """A step begins: asks for the extents of the chunks that it completes."""
        if plan.fence:
            self._settle()
        self._saves = {save.key: save for save in plan.saves}
        if self._saves:
            self._thread.submit(self._reserve, list(self._saves.values()))

    def finish(self) -> None:
        """The step's forward pass has ended: has what got an extent copied, digested and committed."""
        self._settle()
        if self._saves:
            self._copying = self._thread.submit(self._publish, self._saves, self._blocks.computed())
            self._saves = {}

    def close(self) -> None:
        """Ends the thread and the connection."""
        self._settle()
        self._thread.submit(self._client.close)
        self._thread.shutdown()

    def _settle(self) -> None:
        """Waits until the blocks of the last step's saves are read."""
        if self._copying is not None:
            self._copying.result()
            self._copying = None

    # On the publisher's own thread.

    def _connect(self, run_dir: Path, worker: str) -> None:
        self._client = BusClient(run_dir, f"{worker} publisher", self._holder)
        self._key = self._client.connect(CONNECT_MS_MAX).digest_key

    def _reserve(self, saves: Sequence[Save]) -> None:
        if time.monotonic() < self._silent_until:
            self._ticket = 0
            return
        entries = [NewEntry(save.key, len(save.blocks) * self._blocks.block_bytes, save.tail) for save in saves]
        self._ticket = self._client.submit(Reserve(self._holder.id, self._layout, entries))

    def _publish(self, saves: Mapping[bytes, Save], computed: Computed) -> None:
        started = time.perf_counter()
        try:
            slots = self._await_slots() if self._ticket else []
        except BusError as error:
            log.warning("%d chunks are not published: %s", len(saves), error)
            slots = []
        if not self._ticket:
            self.counts["unpublished_chunks"] += len(saves)
        computed.synchronize()
        written = [self._write(saves[slot.key], slot) for slot in slots]
        if written:
            self._client.submit(Commit(self._holder.id, written))
        self.writing = []
        self.counts["publish_seconds"] += time.perf_counter() - started

    def _write(self, save: Save, slot: Slot) -> WrittenEntry:
        length = len(save.blocks) * self._blocks.block_bytes
        digest = self._blocks.save(save.blocks, self._region.data[slot.offset : slot.offset + length], self._key)
        self.counts["published_bytes"] += length
        self.counts["published_chunks"] += 1
        return WrittenEntry(slot.slot, slot.generation, digest)

    def _await_slots(self) -> list[Slot]:
        deadline = time.monotonic() + RESERVE_WAIT_MS_MAX / 1000
        while (left := deadline - time.monotonic()) > 0:
            for ticket, reply in self._client.poll(left * 1000):
                if not isinstance(reply, Reserved):
                    continue
                if ticket == self._ticket:
                    self.writing = [slot.slot for slot in reply.slots]
                    return reply.slots
                # An answer to a step that did not wait for it any longer.
                self._client.submit(Abandon(self._holder.id, [(slot.slot, slot.generation) for slot in reply.slots]))
        self._silent_until = time.monotonic() + SILENT_SECONDS
        self._ticket = 0
        return []
