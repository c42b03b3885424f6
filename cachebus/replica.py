"""What a router knows of the bus: stored chunks and living workers, kept in step by numbered events. Pure state."""

from __future__ import annotations

from collections.abc import Sequence

from cachebus.codec import EventBatch
from cachebus.messages import Removed, SnapshotReply, Stored, Worker, WorkerDown, WorkerUp
from cachebus.messages_hbm import HbmChanged
from cachebus.wire import Tier


class Replica:
    """A copy of the daemon's directory. ``version`` changes with every change."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.unconfirmed: set[str] = set()
        """Workers that the daemon before this one had, and this one was not told of yet."""
        self.version = 0
        self._keys: dict[bytes, frozenset[Tier]] = {}
        self._hbm: dict[str, set[bytes]] = {}
        self._epoch = -1
        self._seq = -1

    def has(self, key: bytes) -> bool:
        """Whether the chunk can be pulled."""
        return key in self._keys

    def known_prefix(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on, can be pulled."""
        for count, key in enumerate(keys):
            if key not in self._keys:
                return count
        return len(keys)

    def nearest_tiers(self, keys: Sequence[bytes], nearest_first: Sequence[Tier]) -> list[Tier]:
        """The nearest tier of each of ``keys``, from the first on, up to one that can't be pulled."""
        held = list(map(self._keys.get, keys))
        nearest: dict[frozenset[Tier] | None, Tier] = {
            one: next(tier for tier in nearest_first if tier in one) for one in set(held) if one is not None
        }
        return [nearest[one] for one in held[: _first(None, held)]]

    def hbm_prefix(self, worker: str, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on, lie in that worker's HBM."""
        held = self._hbm.get(worker) or set()
        return _first(False, list(map(held.__contains__, keys)))

    def hbm_prefixes(self, keys: Sequence[bytes]) -> dict[str, int]:
        """The same for every worker of which anything is known."""
        return {worker: self.hbm_prefix(worker, keys) for worker in self._hbm} if keys else {}

    def hbm_keys(self) -> dict[str, set[bytes]]:
        """The chunks in the HBM of every worker of which anything is known."""
        return {worker: set(keys) for worker, keys in self._hbm.items()}

    def hbm_chunks(self) -> dict[str, int]:
        """How many chunks lie in the HBM of every worker of which anything is known."""
        return {worker: len(keys) for worker, keys in self._hbm.items()}

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and number of the last batch that was applied."""
        return self._epoch, self._seq

    def keys(self, tiers: frozenset[Tier]) -> set[bytes]:
        """Every chunk that one of these tiers has."""
        return {key for key, held in self._keys.items() if held & tiers}

    def tiers(self, key: bytes) -> frozenset[Tier]:
        """The tiers that have a chunk."""
        return self._keys.get(key, frozenset())

    def load(self, snapshot: SnapshotReply, *, keep_workers: bool = False) -> None:
        """Replaces everything by a snapshot. ``keep_workers``: those that a daemon before this one had stay, as unconfirmed."""
        of_another = self.workers if snapshot.epoch != self._epoch else {name: self.workers[name] for name in self.unconfirmed}
        before = of_another if keep_workers else {}
        self._epoch, self._seq = snapshot.epoch, snapshot.seq
        self._keys = {}
        for tier, keys in snapshot.keys.items():
            self._store(keys, tier)
        self.workers = {worker.worker: worker for worker in snapshot.workers}
        self.unconfirmed = before.keys() - self.workers.keys()
        self.workers |= {name: before[name] for name in self.unconfirmed}
        self._hbm = {worker: set(keys) for worker, keys in snapshot.hbm.items()}
        self.version += 1

    def apply(self, batch: EventBatch) -> bool:
        """Applies a batch; False where batches are missing before it or the daemon is another: a snapshot is needed."""
        if batch.epoch != self._epoch:
            return False
        if not batch.events:
            return batch.seq == self._seq
        if batch.seq <= self._seq:
            return True
        if batch.seq != self._seq + 1:
            return False
        self._seq = batch.seq
        for event in batch.events:
            if isinstance(event, Stored):
                self._store(event.keys, event.tier)
            elif isinstance(event, Removed):
                self._remove(event.keys, event.tier)
            elif isinstance(event, WorkerUp):
                self.workers[event.worker.worker] = event.worker
                self.unconfirmed.discard(event.worker.worker)
            elif isinstance(event, WorkerDown):
                self._drop(event.worker)
            elif isinstance(event, HbmChanged):
                event.change(self._hbm.setdefault(event.worker, set()))
        self.version += 1
        return True

    def forget_unconfirmed(self) -> list[str]:
        """Drops the workers that no daemon confirmed, and names them."""
        gone = sorted(self.unconfirmed)
        for worker in gone:
            self._drop(worker)
        self.version += 1
        return gone

    def _drop(self, worker: str) -> None:
        self.workers.pop(worker, None)
        self.unconfirmed.discard(worker)
        self._hbm.pop(worker, None)

    def _store(self, keys: Sequence[bytes], tier: Tier) -> None:
        one = frozenset({tier})
        for key in keys:
            known = self._keys.get(key)
            self._keys[key] = one if known is None else known | one

    def _remove(self, keys: Sequence[bytes], tier: Tier) -> None:
        for key in keys:
            left = self._keys.get(key, frozenset()) - {tier}
            if left:
                self._keys[key] = left
            else:
                self._keys.pop(key, None)


def _first(value: object, items: Sequence[object]) -> int:
    """Where ``value`` is in ``items`` first; how many there are where it is not. A router does this for hundreds of chunks in every request."""
    return items.index(value) if value in items else len(items)
