"""The connector's worker half, outward: copies completed chunks from the engine's blocks to the region.

It runs beside the engine: while that hands over the step's tokens and begins the next steps. The extents are asked for before
the forward pass and are there when it ends. The engine waits only before a step that writes blocks which are being copied, and where
the saves of many steps are under way.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cachebus.client import BusClient
from cachebus.engine.blocks import Blocks, Computed, Entry
from cachebus.engine.break_even import StepTook
from cachebus.engine.transfer import SAVING_STEPS_MAX, Save, StepPlan, in_batches
from cachebus.errors import BusError, HandoverError
from cachebus.holder import Holder
from cachebus.keys import rank_key
from cachebus.messages import Abandon, Commit, NewEntry, Reserve, Reserved, Slot, WrittenEntry
from cachebus.messages_handover import Offer, OfferedEntry, SharedMemory
from cachebus.region import Region

log = logging.getLogger("headstart.connector")

RESERVE_WAIT_MS_MAX = 100
"""How long a step's extents are waited for after the forward pass; past it the step's chunks are not published."""

CONNECT_MS_MAX = 5000
SILENT_SECONDS = 1.0

OFFER_MS = 10_000
"""How long an offer stands. A prompt of 100,000 tokens takes as long to compute, and all of it is read when it is nearly done."""

CHASE_MS = 50
"""How long at a time an answer that is late is waited for; a step's saves go on in between."""


@dataclass(frozen=True)
class _UnderWay:
    """A step's saves: done when the tails' blocks are read, and when all are."""

    tails: Future[None]
    whole: Future[None]


@dataclass(frozen=True)
class _Step:
    plan: StepPlan
    begun: Computed
    computed: Computed


class Publisher:
    """Writes complete chunks into the region: of each what tensor-parallel rank ``rank`` has.

    ``offer``: whether it offers them to engines of the node straight from the blocks.

    The engine's thread calls it; its own thread talks to the bus and copies. ``took``: what the last steps that saved took.
    """

    def __init__(
        self, run_dir: Path, holder: Holder, worker: str, layout: bytes, blocks: Blocks, region: Region, *, rank: int = 0, offer: bool = False
    ) -> None:
        self._holder, self._layout, self._blocks, self._region, self._rank = holder, layout, blocks, region, rank
        self._thread = ThreadPoolExecutor(1, "headstart-publisher")
        self._copiers = ThreadPoolExecutor(blocks.save_threads, "headstart-copier")
        self._copying: dict[int, _UnderWay] = {}
        self._saves: dict[bytes, Save] = {}
        self._number = 0
        self._ticket = 0
        self._came: list[Slot] | None = None
        self._owed: set[int] = set()
        self._closing = False
        self.writing: list[int] = []
        self.took: deque[StepTook] = deque(maxlen=SAVING_STEPS_MAX)
        self._silent_until = 0.0
        self.counts: dict[str, float] = {"published_bytes": 0, "published_chunks": 0, "publish_seconds": 0, "unpublished_chunks": 0}
        self.counts["offered_chunks"] = 0
        self._memory = _shared(blocks, holder, layout) if offer else None
        self._thread.submit(self._connect, run_dir, worker).result()

    def begin(self, plan: StepPlan) -> None:
        """A step begins: asks for the extents of the chunks that it completes."""
        self._settle(max(plan.fence, plan.number - SAVING_STEPS_MAX))
        self._settle_tails(plan.tail_fence)
        self._saves, self._number = {rank_key(save.key, self._rank): save for save in plan.saves}, plan.number
        if self._saves:
            self._plan, self._begun = plan, self._blocks.computed()
            self._thread.submit(self._reserve, self._saves)

    def finish(self) -> None:
        """The step's forward pass has ended: has what got an extent copied, digested and committed."""
        if self._saves:
            tails: Future[None] = Future()
            step = _Step(self._plan, self._begun, self._blocks.computed())
            self._copying[self._number] = _UnderWay(tails, self._thread.submit(self._publish, self._saves, step, tails))
            self._saves = {}

    def close(self) -> None:
        """Ends the thread and the connection."""
        self._closing = True
        self._settle(self._number)
        self._thread.submit(self._client.close)
        self._thread.shutdown()
        self._copiers.shutdown()

    def _settle(self, number: int) -> None:
        """Waits until the blocks that the steps up to ``number`` save are read."""
        for one in [one for one in self._copying if one <= number]:
            self._copying.pop(one).whole.result()

    def _settle_tails(self, number: int) -> None:
        """The same for the blocks of prompts' tails."""
        for one, under_way in self._copying.items():
            if one <= number:
                under_way.tails.result()

    # On the publisher's own thread.

    def _connect(self, run_dir: Path, worker: str) -> None:
        self._client = BusClient(run_dir, f"{worker} publisher", self._holder)
        self._key = self._client.connect(CONNECT_MS_MAX).digest_key

    def _reserve(self, saves: Mapping[bytes, Save]) -> None:
        if time.monotonic() < self._silent_until:
            self._ticket = 0
            return
        self._came = None
        now = int(time.time())
        until = {ttl: now + ttl if ttl else 0 for ttl in {save.ttl_seconds for save in saves.values()}}
        entries = [NewEntry(key, self._length(save), save.tail, save.tenant, until[save.ttl_seconds]) for key, save in saves.items()]
        self._ticket = self._client.submit(Reserve(self._holder.id, self._layout, entries))

    def _publish(self, saves: Mapping[bytes, Save], step: _Step, tails_copied: Future[None]) -> None:
        started = time.perf_counter()
        try:
            slots = self._await_slots() if self._ticket else []
        except BusError as error:
            log.warning("%d chunks are not published: %s", len(saves), error)
            slots = []
        if not self._ticket:
            self.counts["unpublished_chunks"] += len(saves)
        digests: dict[bytes, bytes] = {}
        tails, chunks = [slot for slot in slots if saves[slot.key].tail], [slot for slot in slots if not saves[slot.key].tail]
        try:
            step.computed.synchronize()
            self.took.append(StepTook(step.plan.tokens, step.plan.attended, step.computed.seconds_since(step.begun)))
            digests = self._offer(saves)
            self._copy(saves, tails, digests)
        finally:
            tails_copied.set_result(None)
        if chunks:
            # The step's tokens first: they would wait for the interpreter lock, and behind the chunks on their way to the host.
            time.sleep(self._blocks.save_after_seconds)
            self._copy(saves, chunks, digests)
        self.counts["published_bytes"] += sum(self._length(saves[slot.key]) for slot in slots)
        self.counts["published_chunks"] += len(slots)
        self.writing = []
        self.counts["publish_seconds"] += time.perf_counter() - started

    def _offer(self, saves: Mapping[bytes, Save]) -> dict[bytes, bytes]:
        """Tells who follows where the bytes lie now, before they are copied; their digests."""
        if self._memory is None:
            return {}
        found = dict(zip(saves, self._blocks.digests([save.blocks for save in saves.values()], self._key), strict=True))
        entries = [OfferedEntry(key, digest, saves[key].blocks) for key, digest in found.items()]
        self._client.submit(Offer(self._memory, entries, OFFER_MS))
        self.counts["offered_chunks"] += len(entries)
        return found

    def _copy(self, saves: Mapping[bytes, Save], slots: Sequence[Slot], digests: Mapping[bytes, bytes]) -> None:
        batches = in_batches(slots, self._blocks.save_bytes, lambda slot: self._length(saves[slot.key]))
        for written in self._copiers.map(lambda batch: self._write(saves, batch, digests), batches):
            self._client.submit(Commit(self._holder.id, written))

    def _write(self, saves: Mapping[bytes, Save], slots: Sequence[Slot], known: Mapping[bytes, bytes]) -> list[WrittenEntry]:
        data = self._region.data
        extents = [data[slot.offset : slot.offset + self._length(saves[slot.key])] for slot in slots]
        entries = [Entry(saves[slot.key].blocks, extent) for slot, extent in zip(slots, extents, strict=True)]
        # Nobody writes the blocks between the offer and the copy: whoever is given them waits for the copy.
        digests = self._blocks.save(entries, None if known else self._key)
        digests = [known[slot.key] for slot in slots] if known else digests
        return [WrittenEntry(slot.slot, slot.generation, digest) for slot, digest in zip(slots, digests, strict=True)]

    def _length(self, save: Save) -> int:
        return len(save.blocks) * self._blocks.block_bytes

    def _await_slots(self) -> list[Slot]:
        deadline = time.monotonic() + RESERVE_WAIT_MS_MAX / 1000
        while (left := deadline - time.monotonic()) > 0:
            self._read_replies(left * 1000)
            if self._came is not None:
                slots, self._came = self._came, None
                self.writing = [slot.slot for slot in slots]
                return slots
        self._silent_until = time.monotonic() + SILENT_SECONDS
        self._owed.add(self._ticket)
        self._ticket = 0
        self._thread.submit(self._chase)
        return []

    def _read_replies(self, wait_ms: float) -> None:
        for ticket, reply in self._client.poll(wait_ms):
            self._owed.discard(ticket)
            if not isinstance(reply, Reserved):
                continue
            if ticket == self._ticket:
                self._came = reply.slots
            else:
                # An answer to a step that did not wait for it any longer.
                self._client.submit(Abandon(self._holder.id, [(slot.slot, slot.generation) for slot in reply.slots]))

    def _chase(self) -> None:
        """Gives back what a late answer reserved, though no step may come that saves anything: nobody could write it meanwhile."""
        if self._owed:
            self._read_replies(CHASE_MS)
            if self._owed and not self._closing:
                self._thread.submit(self._chase)


def _shared(blocks: Blocks, holder: Holder, layout: bytes) -> SharedMemory | None:
    try:
        return blocks.shared(holder.id, layout)
    except HandoverError as error:
        log.warning("what this engine computes is handed over through the region alone: %s", error)
        return None
