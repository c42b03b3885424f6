"""What goes first when a tier is full. Plain state machines over slot numbers; a shelf asks and says what may go.

``Lru`` drops what was used longest ago. ``S3Fifo`` (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023) lets new
entries wait in a small queue and drops them there unless they are asked for again, so that a scan of prompts that come once leaves
the rest alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
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

    def evict(self, may_go: Callable[[int], bool]) -> int | None:
        """Takes out the first slot that may go; None where none may."""

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

    def evict(self, may_go: Callable[[int], bool]) -> int | None:
        for slot in self._slots:
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

    def evict(self, may_go: Callable[[int], bool]) -> int | None:
        # Each pass takes a use from a slot or moves it on, so this many passes have seen every slot without uses.
        for _ in range((_USES_MAX + 2) * len(self._uses)):
            from_small = len(self._small) * _SMALL_SHARE >= len(self._uses) or not self._main
            queue = self._small if from_small else self._main
            slot, key = queue.popitem(last=False)
            if self._uses[slot]:
                self._uses[slot] = 0 if from_small else self._uses[slot] - 1
                self._main[slot] = key
            elif may_go(slot):
                del self._uses[slot]
                if from_small:
                    self._ghosts[key] = None
                    if len(self._ghosts) > len(self._uses):
                        self._ghosts.popitem(last=False)
                return slot
            else:
                self._main[slot] = key
        return None

    def coldest(self, count: int) -> list[int]:
        return [*islice(self._small, count), *islice(self._main, count)][:count]
