"""What goes first when a tier is full. Plain state machines over slot numbers; a shelf asks and says what may go.

``Lru`` drops what was used longest ago. ``S3Fifo`` (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023) lets new
entries wait in a small queue and drops them there unless they are asked for again, so that a scan of prompts that come once leaves
the rest alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Literal, Protocol

Policy = Literal["lru", "s3fifo"]

_SMALL_SHARE = 10
_USES_MAX = 3


class Order(Protocol):
    """An order of eviction. A slot is added once, used any number of times, and leaves by ``drop`` or ``evict``."""

    def add(self, slot: int, key: bytes) -> None:
        """A slot holds ``key`` from now on."""

    def use(self, slot: int) -> None:
        """The slot was asked for; unknown slots are passed over."""

    def drop(self, slot: int) -> None:
        """The slot is gone for another reason; unknown slots are passed over."""

    def evict(self, may_go: Callable[[int], bool], looks_max: int | None = None) -> int | None:
        """Takes out the first slot that may go; None where none may. ``looks_max``: how many slots of a queue are asked about at most."""

    def coldest(self, count: int) -> list[int]:
        """The next ``count`` candidates, without taking them."""


def order(policy: Policy) -> Order:
    """An empty order of this kind."""
    return S3Fifo() if policy == "s3fifo" else Lru()


class Lru:
    """Least recently used first."""

    def __init__(self) -> None:
        self._slots: OrderedDict[int, None] = OrderedDict()

    def add(self, slot: int, key: bytes) -> None:
        self._slots[slot] = None

    def use(self, slot: int) -> None:
        if slot in self._slots:
            self._slots.move_to_end(slot)

    def drop(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def evict(self, may_go: Callable[[int], bool], looks_max: int | None = None) -> int | None:
        for slot in islice(self._slots, looks_max):
            if may_go(slot):
                del self._slots[slot]
                return slot
        return None

    def coldest(self, count: int) -> list[int]:
        return list(islice(self._slots, count))


class S3Fifo:
    """Two queues and a memory of keys that left the small one. Counts uses up to three."""

    def __init__(self) -> None:
        self._small: OrderedDict[int, bytes] = OrderedDict()
        self._main: OrderedDict[int, bytes] = OrderedDict()
        self._uses: dict[int, int] = {}
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def add(self, slot: int, key: bytes) -> None:
        known = self._ghosts.pop(key, key) is None
        (self._main if known else self._small)[slot] = key
        self._uses[slot] = 0

    def use(self, slot: int) -> None:
        if slot in self._uses:
            self._uses[slot] = min(self._uses[slot] + 1, _USES_MAX)

    def drop(self, slot: int) -> None:
        if self._uses.pop(slot, None) is not None:
            self._small.pop(slot, None)
            self._main.pop(slot, None)

    def evict(self, may_go: Callable[[int], bool], looks_max: int | None = None) -> int | None:
        if len(self._small) * _SMALL_SHARE >= len(self._uses) and (slot := self._from_small(may_go, looks_max)) is not None:
            return slot
        # Each pass takes a use from every slot that may go, so after so many one without uses was seen.
        for _ in range(_USES_MAX + 1):
            if (slot := self._from_main(may_go, looks_max)) is not None:
                return slot
        return self._from_small(may_go, looks_max, share=0)

    def coldest(self, count: int) -> list[int]:
        return [*islice(self._small, count), *islice(self._main, count)][:count]

    def _from_small(self, may_go: Callable[[int], bool], looks_max: int | None, share: int = _SMALL_SHARE) -> int | None:
        """The first slot that nobody asked for again; those before it that somebody did are in the main queue from now on.

        Unless ``share`` is 0, no more of them than leave the queue its share.
        """
        passes_max = len(self._small) - -(-len(self._uses) // share) if share else len(self._small)
        found, passed = self._walked(self._small, may_go, looks_max, passes_max)
        for slot in passed:
            self._uses[slot] = 0
            self._main[slot] = self._small.pop(slot)
        if found is not None:
            self._ghosts[self._small.pop(found)] = None
            del self._uses[found]
            if len(self._ghosts) > len(self._uses):
                self._ghosts.popitem(last=False)
        return found

    def _from_main(self, may_go: Callable[[int], bool], looks_max: int | None) -> int | None:
        """The first slot without uses; those before it have one less and go to the end."""
        found, passed = self._walked(self._main, may_go, looks_max, len(self._main))
        for slot in passed:
            self._uses[slot] -= 1
            self._main.move_to_end(slot)
        if found is not None:
            del self._main[found]
            del self._uses[found]
        return found

    def _walked(self, slots: Iterable[int], may_go: Callable[[int], bool], looks_max: int | None, passes_max: int) -> tuple[int | None, list[int]]:
        """The first slot without uses that may go, and those before it that were used and may. What may not go now is passed over as it is."""
        passed: list[int] = []
        for slot in islice(slots, looks_max):
            if len(passed) > passes_max:
                break
            if not may_go(slot):
                continue
            if not self._uses[slot]:
                return slot, passed
            passed.append(slot)
        return None, passed
