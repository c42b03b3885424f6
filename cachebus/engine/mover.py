"""The connector's worker half, inward: pulls extents into the engine's blocks on a thread of its own and checks them where they arrived.

Pieces that lie in DRAM are copied at once. A piece that the daemon is still bringing up from a slower tier is copied as soon as its record
says that it is there, so a prefix is pulled while its end is still being read from disk; other requests' pulls go on meanwhile. A part that
another engine is still computing is copied when that engine has published it, or, where it offers that, straight out of its blocks before; what
is not there any more by then comes from the region.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cachebus.client import BusClient
from cachebus.engine.blocks import Blocks, Computed, Entry
from cachebus.engine.break_even import PullTook, StepTook
from cachebus.engine.following import Following
from cachebus.engine.neighbours import LOOK_SECONDS as NEIGHBOUR_SECONDS
from cachebus.engine.neighbours import Neighbours
from cachebus.engine.publisher import CONNECT_MS_MAX
from cachebus.engine.transfer import Load, LoadPiece, in_batches
from cachebus.holder import Holder
from cachebus.messages import Granted, Quarantine, Release, Withdraw
from cachebus.messages_handover import Stale
from cachebus.region import Region
from cachebus.table import State
from cachebus.wire import Tier

log = logging.getLogger("headstart.connector")

IDLE_WAIT_SECONDS = 0.005
"""How long an engine with nothing to compute waits for a load to end, instead of asking again a step later."""

LOOK_SECONDS = 0.0005
"""How often records are looked at while chunks are on their way up."""

FOLLOW_SECONDS = 0.002
"""How often the daemon's answers are looked for while all that is awaited is computed elsewhere."""

PULLS_KEPT = 64
"""How many pulls' times may wait to be read by the scheduler half."""

TORN_READS_MAX = 3
"""The daemon may be writing a record while it is looked at; one that is unreadable this often is gone."""


class _Took(Protocol):
    @property
    def took(self) -> deque[Any]: ...


@dataclass
class _Pull:
    load: Load
    computed: Computed
    started: float
    deadline: float
    coming: list[LoadPiece]
    leases: list[int]
    following: Following | None = None
    ticket: int = 0
    copies: list[tuple[list[LoadPiece], Future[list[bool]]]] = field(default_factory=list)
    handed: list[tuple[list[LoadPiece], Future[list[bool]]]] = field(default_factory=list)
    lost: list[LoadPiece] = field(default_factory=list)
    came: dict[Tier, PullTook] = field(default_factory=dict)
    unreadable: int = 0


class Mover(threading.Thread):
    """Carries out loads. ``take_finished`` hands over what has ended since the last call, each request once. ``took``: what the last pulls took.

    ``take_offers``: whether what other engines of the node offer is pulled straight from them.
    ``wait_ms_max``: how long it waits for the next piece of a load to come up; what is not there then is for the engine to compute.
    """

    def __init__(
        self,
        run_dir: Path,
        holder: Holder,
        worker: str,
        blocks: Blocks,
        region: Region,
        *,
        verify: bool,
        wait_ms_max: int,
        take_offers: bool = False,
    ) -> None:
        super().__init__(name="headstart-mover", daemon=True)
        self._blocks, self._region = blocks, region
        self._wait_seconds = wait_ms_max / 1000
        self._loads: queue.SimpleQueue[tuple[Load, Computed] | None] = queue.SimpleQueue()
        self._open: list[_Pull] = []
        self._changed = threading.Condition()
        self._loading = 0
        self._reading: dict[int, list[int]] = {}
        self._finished: set[str] = set()
        self._invalid: set[int] = set()
        names = (
            "pulled_bytes",
            "pulled_chunks",
            "pull_seconds",
            "integrity_failures",
            "late_chunks",
            "handed_bytes",
            "handed_chunks",
            "stale_offers",
        )
        self.counts: dict[str, float] = dict.fromkeys(names, 0)
        self.took: deque[PullTook] = deque(maxlen=PULLS_KEPT)
        self._client = BusClient(run_dir, f"{worker} mover", holder)
        digest_key = self._client.connect(CONNECT_MS_MAX).digest_key
        self._key = digest_key if verify else None
        self._neighbours = Neighbours(run_dir, blocks, self._key, wanted=take_offers)
        self._copiers = ThreadPoolExecutor(blocks.load_threads, "headstart-copier")

    def submit(self, load: Load, computed: Computed) -> None:
        """Queues a load; every load that was queued is reported finished once. Nothing is copied before ``computed``.

        The blocks were another request's: a step that still runs on a device may be writing them.
        """
        with self._changed:
            self._loading += 1
            if load.lease:
                self._reading[load.lease] = [piece.offset for piece in load.pieces]
        self._loads.put((load, computed))

    def take_finished(self, wait_seconds: float) -> tuple[set[str], set[int]]:
        """Requests whose loads ended, and the blocks among them whose bytes are not good.

        Where loads are under way and none has ended, waits for one to end, ``wait_seconds`` at most.
        """
        with self._changed:
            if wait_seconds:
                self._changed.wait_for(lambda: self._finished or not self._loading, wait_seconds)
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
        ending = False
        while self._open or not ending:
            try:
                given = self._loads.get(timeout=self._pause())
            except queue.Empty:
                pass
            else:
                ending = ending or given is None
                if given is not None:
                    self._begin(*given)
            self._read_replies()
            for pull in list(self._open):
                self._look(pull)
                if not pull.coming and not pull.handed and (pull.following is None or pull.following.is_over or pull.lost):
                    self._open.remove(pull)
                    self._end(pull)
            if not any(pull.handed for pull in self._open):
                self._neighbours.forget_dead()
        self._copiers.shutdown()
        self._client.close()

    def _begin(self, load: Load, computed: Computed) -> None:
        now = time.perf_counter()
        coming, leases = [piece for piece in load.pieces if not piece.ready], [load.lease] if load.lease else []
        pull = _Pull(load, computed, now, now + self._wait_seconds, coming, leases, self._following(load, now))
        self._copy(pull, [piece for piece in load.pieces if piece.ready])
        self._open.append(pull)

    def _following(self, load: Load, now: float) -> Following | None:
        return Following(load.follows, now, self._neighbours.reaches) if load.follows else None

    def _copy(self, pull: _Pull, pieces: list[LoadPiece]) -> None:
        for batch in in_batches(pieces, self._blocks.load_bytes, lambda piece: piece.length):
            pull.copies.append((batch, self._copiers.submit(self._pull, batch, pull.computed)))

    def _look(self, pull: _Pull) -> None:
        """Has copied what came up since the last look, in order. Where a piece is lost, so is what comes after it: it is computed, too."""
        came: list[LoadPiece] = []
        while pull.coming:
            piece = pull.coming[0]
            record = self._region.table.record(piece.slot)
            if record is None or record.generation != piece.generation:
                pull.unreadable += 1
                gone = pull.unreadable >= TORN_READS_MAX
            else:
                pull.unreadable = 0
                gone = record.state == State.DOOMED
                if record.state == State.COMMITTED:
                    came.append(pull.coming.pop(0))
                    now = time.perf_counter()
                    pull.deadline = now + self._wait_seconds
                    known = pull.came.get(piece.source)
                    pull.came[piece.source] = PullTook(piece.source, piece.length + (known.length if known else 0), now - pull.started)
                    continue
            if gone or time.perf_counter() >= pull.deadline:
                pull.lost, pull.coming = pull.coming, []
            break
        self._copy(pull, came)
        if pull.following is not None:
            self._follow(pull, pull.following)

    def _follow(self, pull: _Pull, following: Following) -> None:
        """Asks for what is next of what another engine computes; nothing more where a piece before it is lost."""
        now = time.perf_counter()
        for one in [one for one in pull.handed if one[1].done()]:
            pull.handed.remove(one)
            self._handed(following, *one)
        following.look(now)
        if not following.is_over and not following.is_asking and not pull.lost:
            pull.ticket = self._client.submit(following.ask(now))

    def _handed(self, following: Following, pieces: Sequence[LoadPiece], fetched: Future[list[bool]]) -> None:
        """What came straight from another engine; what did not is asked for again."""
        outcome = list(zip(pieces, fetched.result(), strict=True))
        good = [piece for piece, is_good in outcome if is_good]
        if stale := [piece for piece, is_good in outcome if not is_good]:
            self._client.submit(Stale([piece.key for piece in stale]))
            following.again(stale)
        self.counts["handed_chunks"] += len(good)
        self.counts["handed_bytes"] += sum(piece.length for piece in good)
        self.counts["stale_offers"] += len(stale)

    def _read_replies(self, wait_ms: float = 0) -> None:
        for ticket, reply in self._client.poll(wait_ms):
            if not isinstance(reply, Granted):
                continue
            pull = next((one for one in self._open if one.ticket == ticket and one.following is not None), None)
            if pull is None or pull.following is None:
                if reply.lease:
                    self._client.submit(Release([reply.lease]))
                continue
            now = time.perf_counter()
            self._neighbours.learn(reply.memories)
            pieces = pull.following.came(reply.extents, now)
            pull.ticket = 0
            if reply.lease:
                pull.leases.append(reply.lease)
                with self._changed:
                    self._reading[reply.lease] = [piece.offset for piece in pieces if not piece.memory]
            pull.deadline = now + self._wait_seconds
            self._take(pull, pieces)

    def _take(self, pull: _Pull, pieces: list[LoadPiece]) -> None:
        """More pieces, behind those there are; what is offered at once, since it may not be there for long."""
        for batch in in_batches([piece for piece in pieces if piece.memory], self._blocks.load_bytes, lambda piece: piece.length):
            pull.handed.append((batch, self._copiers.submit(self._neighbours.fetch, batch, pull.computed)))
        pieces = [piece for piece in pieces if not piece.memory]
        if pull.coming:
            pull.coming += pieces
            return
        ready = next((number for number, piece in enumerate(pieces) if not piece.ready), len(pieces))
        self._copy(pull, pieces[:ready])
        pull.coming = pieces[ready:]

    def _pause(self) -> float | None:
        """How long the next load may be waited for, after a wait for what else is on its way."""
        if not self._open:
            return NEIGHBOUR_SECONDS if self._neighbours.known else None
        if any(pull.coming for pull in self._open):
            return LOOK_SECONDS
        if not self._neighbours.reaches:
            return FOLLOW_SECONDS
        if handed := [fetched for pull in self._open for _, fetched in pull.handed]:
            wait(handed, FOLLOW_SECONDS, FIRST_COMPLETED)
        else:
            self._read_replies(1000 * FOLLOW_SECONDS)
        return 0

    def _end(self, pull: _Pull) -> None:
        copied = [outcome for batch, copies in pull.copies for outcome in zip(batch, copies.result(), strict=True)]
        bad = [piece for piece, good in copied if not good]
        missing = pull.following.missing if pull.following is not None else []
        self.counts["pulled_bytes"] += sum(piece.length for piece, _ in copied)
        self.counts["pulled_chunks"] += len(copied)
        self.counts["late_chunks"] += len(pull.lost) + len(missing)
        if pull.following is None:
            # What was followed came as it was computed, which says nothing of the tiers.
            self.counts["pull_seconds"] += time.perf_counter() - pull.started
            self.took.extend(_took(pull, sum(piece.length for piece, _ in copied)))
        with self._changed:
            self._finished.add(pull.load.request_id)
            targets = [*(piece.blocks for piece in [*bad, *pull.lost]), *(part.blocks for part in missing)]
            self._invalid.update(block for blocks in targets for block in blocks if block >= 0)
            self._changed.notify()
        for piece in bad:
            self.counts["integrity_failures"] += 1
            log.error("chunk %s does not match its digest: it is computed again", piece.key.hex()[:16])
            self._client.submit(Quarantine(piece.key, piece.digest))
        if pull.ticket:
            self._client.submit(Withdraw(pull.ticket))
        if pull.leases:
            self._client.submit(Release(pull.leases))
        with self._changed:
            self._loading -= 1
            for lease in pull.leases:
                self._reading.pop(lease, None)

    def _pull(self, pieces: Sequence[LoadPiece], computed: Computed) -> list[bool]:
        computed.synchronize()
        data = self._region.data
        digests = self._blocks.load([Entry(piece.blocks, data[piece.offset : piece.offset + piece.length]) for piece in pieces], self._key)
        return [not self._key or digest == piece.digest for piece, digest in zip(pieces, digests, strict=True)]


def took_since(*parts: _Took) -> list[StepTook | PullTook]:
    """Takes what has been noted since the last call by each of ``parts``: a publisher, a mover."""
    found: list[StepTook | PullTook] = []
    for part in parts:
        while part.took:
            found.append(part.took.popleft())
    return found


def _took(pull: _Pull, copied_bytes: int) -> list[PullTook]:
    """What a pull says of the tiers' speed: of DRAM's where nothing had to come from below, of theirs where something had."""
    seconds = time.perf_counter() - pull.started
    if not pull.came and not pull.lost:
        return [PullTook("dram", copied_bytes, seconds)]
    # Of a tier that left something out no more came in all the time that it was waited for.
    late = {piece.source: PullTook(piece.source, 1, seconds) for piece in pull.lost}
    late |= {tier: PullTook(tier, took.length, seconds) for tier, took in pull.came.items() if tier in late}
    return list({**pull.came, **late}.values())
