"""What engines offer of their own memory to those who follow what they compute. A plain state machine, the directory's.

An offer is a hint with a digest: it ends when its time is up, when its engine dies, or when another one of the same key is made, and its engine
may reuse the blocks before. A hold is an engine's question when nobody needs the blocks of a request any more, answered when that is so or its
time is up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from cachebus.effects import Answer, Effect
from cachebus.messages import Done, Extent
from cachebus.messages_handover import HandoverRequest, Offer, OfferedEntry, SharedMemory, Stale
from cachebus.shelf import Entry

OFFERS_MAX = 1 << 14
"""Offers of all engines together; one more ends the oldest. At 2 MiB a chunk they stand for 32 GiB."""


@dataclass(frozen=True)
class Offered:
    """An entry in an engine's memory, until ``until_ms``."""

    memory: SharedMemory
    entry: OfferedEntry
    until_ms: float

    def extent(self) -> Extent:
        """How it is told to who asked."""
        memory, entry = self.memory, self.entry
        length = len(entry.blocks) * len(memory.layers) * memory.page_bytes
        return Extent(entry.key, 0, length, entry.digest, memory=memory.id, blocks=entry.blocks)


@dataclass(frozen=True)
class _Holding:
    client: bytes
    ticket: int
    holder: str
    keys: frozenset[bytes]
    until_ms: float


class Offers:
    """See the module."""

    def __init__(self) -> None:
        # A dict keeps the order in which they were made.
        self._offers: dict[bytes, Offered] = {}
        self._read: dict[int, list[bytes]] = {}
        self._readers: Counter[bytes] = Counter()
        self._holds: list[_Holding] = []
        self.granted = self.stale = 0

    def take(self, client: bytes, ticket: int, request: HandoverRequest, now_ms: float) -> None:
        """An engine offers entries, found some stale, or keeps the blocks of some: ``answers`` says when it need not."""
        if isinstance(request, Offer):
            self._add(request, now_ms)
        elif isinstance(request, Stale):
            self.stale += sum(self._offers.pop(key, None) is not None for key in request.keys)
        else:
            self._holds.append(_Holding(client, ticket, request.holder, frozenset(request.keys), now_ms + request.wait_ms))

    def find(self, key: bytes, layout: bytes, reaches: Collection[str], now_ms: float) -> Offered | None:
        """What is offered under ``key`` to an engine of that layout that reaches these devices."""
        found = self._offers.get(key)
        if found is None or found.memory.device not in reaches or found.memory.layout != layout or found.until_ms <= now_ms:
            return None
        return found

    def read(self, lease: int, offered: Sequence[Offered]) -> list[SharedMemory]:
        """What was granted under a lease is read until the lease ends; where it lies."""
        if offered:
            self.granted += len(offered)
            self._read[lease] = [one.entry.key for one in offered]
            self._readers.update(self._read[lease])
        return list({one.memory.id: one.memory for one in offered}.values())

    def ended(self, lease: int) -> None:
        """A lease ended."""
        for key in self._read.pop(lease, ()):
            self._readers[key] -= 1
            if not self._readers[key]:
                del self._readers[key]

    def holder_died(self, holder: str) -> None:
        """Its memory is gone."""
        self._offers = {key: offered for key, offered in self._offers.items() if offered.memory.holder != holder}
        self._holds = [hold for hold in self._holds if hold.holder != holder]

    def tick(self, now_ms: float) -> None:
        """Forgets the oldest offers, as far as their time is up."""
        while self._offers and (oldest := next(iter(self._offers.values()))).until_ms <= now_ms:
            del self._offers[oldest.entry.key]

    def answers(self, awaited: Iterable[Sequence[bytes]], now_ms: float) -> list[Effect]:
        """The holds that end: nobody reads any of their keys, none is in ``awaited`` (those of each who waits), or their time is up."""
        if not self._holds:
            return []
        wanted = {key for keys in awaited for key in keys} | self._readers.keys()
        over = [hold for hold in self._holds if hold.until_ms <= now_ms or wanted.isdisjoint(hold.keys)]
        self._holds = [hold for hold in self._holds if hold not in over]
        return [Answer(hold.client, hold.ticket, Done()) for hold in over]

    def counts(self) -> dict[str, float]:
        """Gauges and counters by name."""
        return {"offers": len(self._offers), "offers_granted_total": self.granted, "offers_stale_total": self.stale, "holds": len(self._holds)}

    def _add(self, offer: Offer, now_ms: float) -> None:
        for entry in offer.entries:
            self._offers.pop(entry.key, None)
            self._offers[entry.key] = Offered(offer.memory, entry, now_ms + offer.valid_ms)
        for key in list(self._offers)[: max(0, len(self._offers) - OFFERS_MAX)]:
            del self._offers[key]


def entries_of(run: Iterable[Entry | Offered]) -> list[Entry]:
    """Those of a run that lie in the region."""
    return [one for one in run if isinstance(one, Entry)]
