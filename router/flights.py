"""Single flight: a prefix that is being computed is computed once; who needs it too waits for it.

A flight is one computation of a run of chunks. It belongs to everybody who waits for it and is aborted only when nobody
does. When it fails, all wake and decide anew, so the first of them to do so becomes the next leader.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol


class Known(Protocol):
    """The part of the replica that says what is stored."""

    def known_prefix(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on, can be pulled."""


class Flight:
    """One computation. ``task`` is None where the computation is a request's own decode leg, which ends it itself.

    ``computed``: it ended well, so whatever of its chunks is not stored by now never will be. ``until``: when it is thought to end.
    ``claim``: the number under which other routers hear of it. ``ended_at``: monotonic seconds.
    """

    def __init__(self, keys: Sequence[bytes], until: float, claim: int) -> None:
        self.keys = frozenset(keys)
        self.until, self.claim = until, claim
        self.task: asyncio.Task[Any] | None = None
        self.ended_at: float | None = None
        self.computed = False
        self._interested = 0

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self.ended_at is not None

    def join(self) -> None:
        """One more waits for it."""
        self._interested += 1

    @property
    def interested(self) -> int:
        """How many wait for it."""
        return self._interested

    def leave(self) -> None:
        """One less does; the last one takes the computation along."""
        self._interested -= 1
        if self._interested == 0 and self.task is not None:
            self.task.cancel()


class Flights:
    """The flights under way, by the chunks they compute. ``ended`` hears of each that ends."""

    def __init__(self, known: Known, ended: Callable[[Flight], None] = lambda flight: None) -> None:
        self._known, self._ended = known, ended
        self._by_key: dict[bytes, Flight] = {}
        self.under_way: set[Flight] = set()
        self._changed = asyncio.Event()

    def start(self, keys: Sequence[bytes], computation: Coroutine[Any, Any, Any] | None, until: float, claim: int) -> Flight:
        """Begins a flight over ``keys``; the caller has joined it."""
        flight = Flight(keys, until, claim)
        flight.join()
        self.under_way.add(flight)
        for key in keys:
            self._by_key.setdefault(key, flight)
        if computation is not None:
            flight.task = asyncio.create_task(computation)
            # Asking for the exception also marks it as seen: a leader that has left never will.
            flight.task.add_done_callback(lambda task: self.end(flight, computed=not task.cancelled() and task.exception() is None))
        return flight

    def end(self, flight: Flight, *, computed: bool) -> None:
        """The computation is over, well or not: everybody looks again. Only the first word on a flight counts."""
        if flight.ended:
            return
        flight.ended_at, flight.computed = time.monotonic(), computed
        self.under_way.discard(flight)
        for key in flight.keys:
            if self._by_key.get(key) is flight:
                del self._by_key[key]
        self._ended(flight)
        self.wake()

    def wake(self) -> None:
        """Something was stored or ended."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self, seconds_max: float | None) -> None:
        """Waits until something was stored or ended, ``seconds_max`` at most where there is a limit."""
        try:
            async with asyncio.timeout(seconds_max):
                await self._changed.wait()
        except TimeoutError:
            return

    def covering(self, keys: Sequence[bytes], known: int) -> tuple[Flight, int] | None:
        """The flight that computes the chunk after the ``known`` ones, and how many chunks from there on it computes."""
        flight = self._by_key.get(keys[known]) if known < len(keys) else None
        if flight is None:
            return None
        count = next((i for i, key in enumerate(keys[known:]) if key not in flight.keys), len(keys) - known)
        return flight, count

    async def wait(self, flight: Flight, keys: Sequence[bytes], count: int, seconds_max: float) -> None:
        """Waits until the first ``count`` of ``keys`` are stored, the flight has ended, or the time is up."""
        flight.join()
        try:
            async with asyncio.timeout(seconds_max):
                while not flight.ended and self._known.known_prefix(keys[:count]) < count:
                    await self._changed.wait()
        except TimeoutError:
            pass
        finally:
            flight.leave()

    async def settled(self, keys: Sequence[bytes], seconds_max: float) -> None:
        """Waits until all of ``keys`` are stored or the time is up: an answer may overtake the events that precede it."""
        try:
            async with asyncio.timeout(seconds_max):
                while self._known.known_prefix(keys) < len(keys):
                    await self._changed.wait()
        except TimeoutError:
            return
