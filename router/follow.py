"""A decode leg that begins while its prompt is still being computed: its engine pulls what is there and the rest as it is published.

It begins so late that its engine holds blocks for no longer than the pull takes, and so early that little is left to pull when the last chunk is
computed. Engines find each other's chunks on their own node alone, so a decode worker elsewhere waits for the prefill leg's end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from cachebus.messages import Report, Worker
from router.flights import Flight, Flights
from router.reports import arrived

PART_MS_MAX = 3000
"""How long an engine waits for the next part before it computes the rest itself. A step of prefill takes less."""

AHEAD, AHEAD_SECONDS = 2.0, 0.05
"""How much longer than the pull the rest may take to compute when the leg begins, and what the leg takes before it pulls."""


@dataclass
class Computing:
    """A prefill leg under way: at which worker, and its report to come."""

    worker: Worker | None = None
    report: asyncio.Future[Report] | None = None


@dataclass(frozen=True)
class Followed:
    """What a decode leg follows. The flight is the request's own until it ``leave``s."""

    flight: Flight
    computing: Computing

    async def part_ms(self, worker: Worker) -> int:
        """How long the worker's engine is to wait for each part; 0 when all is there, which is waited for where its node is another."""
        if self.flight.ended or self.computing.worker is None:
            return 0
        if self.computing.worker.node == worker.node:
            return PART_MS_MAX
        if self.flight.task is not None:
            await asyncio.wait([self.flight.task])
        return 0

    async def report(self, wait_ms: int) -> Report | None:
        """The prefill leg's report, if it comes within ``wait_ms``."""
        return await arrived(self.computing.report, wait_ms) if self.computing.report is not None else None

    def leave(self) -> None:
        """The request needs it no longer."""
        self.flight.leave()


def begins_in(rest_seconds: float, pull_seconds: float) -> float:
    """How long after a chunk was published the leg is to begin, where the rest takes so long to compute and what is there so long to pull."""
    return max(0.0, rest_seconds - AHEAD * pull_seconds - AHEAD_SECONDS)


async def nearly_computed(flights: Flights, computing: Computing, known: Callable[[], int], begins: Callable[[int, Worker], float | None]) -> None:
    """Returns when the decode leg may begin. ``begins``: how long after so many chunks were stored that is; None where nobody knows."""
    before = stored = known()
    at, left = time.monotonic(), None
    while left is None or left > 0:
        await flights.change(left)
        if (now_stored := known()) != stored:
            stored, at = now_stored, time.monotonic()
        seconds = begins(stored, computing.worker) if computing.worker is not None and stored > before else None
        left = None if seconds is None else at + seconds - time.monotonic()
