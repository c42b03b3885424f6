"""The connector's worker half: moves bytes between the engine's blocks and the region.

Pulls run on a thread of their own, in the order in which they were asked for, and are checked where they arrived.
Publishing runs on the engine's thread at the end of the step that completed a chunk: the extents are asked for before
the forward pass and are there when it ends, so the step pays for one copy and the digest.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from cachebus.client import BusClient
from cachebus.engine.blocks import Blocks
from cachebus.engine.transfer import Load, LoadPiece, Save
from cachebus.holder import Holder
from cachebus.messages import Abandon, Commit, NewEntry, Quarantine, Release, Reserve, Reserved, Slot, WrittenEntry
from cachebus.region import Region

log = logging.getLogger("headstart.connector")

RESERVE_WAIT_MS_MAX = 20
"""What a step may wait for its extents after the forward pass; past it the step's chunks are not published."""

CONNECT_MS_MAX = 5000
SILENT_SECONDS = 1.0


class Mover(threading.Thread):
    """Carries out loads. ``take_finished`` hands over what has ended since the last call, each request once."""

    def __init__(self, run_dir: Path, holder: Holder, worker: str, blocks: Blocks, region: Region, verify: bool) -> None:
        super().__init__(name="headstart-mover", daemon=True)
        self._run_dir, self._holder, self._worker = run_dir, holder, worker
        self._blocks, self._region, self._verify = blocks, region, verify
        self._loads: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._reading: dict[int, list[int]] = {}
        self._finished: set[str] = set()
        self._invalid: set[int] = set()
        self.counts: dict[str, float] = {"pulled_bytes": 0, "pulled_chunks": 0, "pull_seconds": 0, "integrity_failures": 0}
        self._client = BusClient(run_dir, f"{worker} mover", holder)
        self._key = self._client.connect(CONNECT_MS_MAX).digest_key

    def submit(self, load: Load) -> None:
        """Queues a load; every load that was queued is reported finished once."""
        with self._lock:
            self._reading[load.lease] = [piece.offset for piece in load.pieces]
        self._loads.put(load)

    def take_finished(self) -> tuple[set[str], set[int]]:
        """Requests whose loads ended, and the blocks among them whose bytes are not good."""
        with self._lock:
            finished, self._finished = self._finished, set()
            invalid, self._invalid = self._invalid, set()
        return finished, invalid

    def reading(self) -> dict[int, list[int]]:
        """The extents that loads still read, by lease."""
        with self._lock:
            return dict(self._reading)

    def stop(self) -> None:
        """Ends the thread after the loads that are queued."""
        self._loads.put(None)
        self.join(timeout=5)

    def run(self) -> None:
        while (load := self._loads.get()) is not None:
            invalid: set[int] = set()
            started = time.perf_counter()
            for piece in load.pieces:
                if not self._pull(piece):
                    invalid.update(block for block in piece.blocks if block >= 0)
            self.counts["pull_seconds"] += time.perf_counter() - started
            self._client.submit(Release([load.lease]))
            with self._lock:
                self._reading.pop(load.lease, None)
                self._finished.add(load.request_id)
                self._invalid |= invalid
            self._client.poll()
        self._client.close()

    def _pull(self, piece: LoadPiece) -> bool:
        extent = self._region.data[piece.offset : piece.offset + piece.length]
        self._blocks.load(piece.blocks, extent)
        self.counts["pulled_bytes"] += piece.length
        self.counts["pulled_chunks"] += 1
        if not self._verify or self._blocks.digest(piece.blocks, extent, self._key) == piece.digest:
            return True
        self.counts["integrity_failures"] += 1
        log.error("chunk %s does not match its digest: it is computed again", piece.key.hex()[:16])
        self._client.submit(Quarantine(piece.key, piece.digest))
        return False


class Publisher:
    """Writes complete chunks into the region. Belongs to the engine's thread."""

    def __init__(self, run_dir: Path, holder: Holder, worker: str, layout: bytes, blocks: Blocks, region: Region) -> None:
        self._holder, self._layout, self._blocks, self._region = holder, layout, blocks, region
        self._client = BusClient(run_dir, f"{worker} publisher", holder)
        self._key = self._client.connect(CONNECT_MS_MAX).digest_key
        self._ticket = 0
        self._saves: dict[bytes, Save] = {}
        self.writing: list[int] = []
        self._silent_until = 0.0
        self.counts: dict[str, float] = {"published_bytes": 0, "published_chunks": 0, "publish_seconds": 0, "unpublished_chunks": 0}

    def begin(self, saves: Sequence[Save]) -> None:
        """Asks for the extents of the chunks that this step completes."""
        self._saves = {}
        if not saves or time.monotonic() < self._silent_until:
            self.counts["unpublished_chunks"] += len(saves)
            return
        self._saves = {save.key: save for save in saves}
        entries = [NewEntry(save.key, len(save.blocks) * self._blocks.block_bytes, save.tail) for save in saves]
        self._ticket = self._client.submit(Reserve(self._holder.id, self._layout, entries))

    def finish(self) -> None:
        """Copies, digests and commits what got an extent; called when the step's forward pass has ended."""
        if not self._saves:
            return
        started = time.perf_counter()
        slots = self._await_slots()
        written = [self._write(self._saves[slot.key], slot) for slot in slots]
        if written:
            self._client.submit(Commit(self._holder.id, written))
        self._saves, self.writing = {}, []
        self.counts["publish_seconds"] += time.perf_counter() - started

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def _write(self, save: Save, slot: Slot) -> WrittenEntry:
        length = len(save.blocks) * self._blocks.block_bytes
        extent = self._region.data[slot.offset : slot.offset + length]
        self._blocks.save(save.blocks, extent)
        self.counts["published_bytes"] += length
        self.counts["published_chunks"] += 1
        return WrittenEntry(slot.slot, slot.generation, self._blocks.digest(save.blocks, extent, self._key))

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
        self.counts["unpublished_chunks"] += len(self._saves)
        return []
