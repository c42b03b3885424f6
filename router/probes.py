"""Calls the workers' /health, paced, and lets go of what still waits for a worker that is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from cachebus.messages import Worker
from router.legs import Legs

log = logging.getLogger("headstart.router")

_LOOK_SECONDS = 0.1


class Probes:
    """One task a router. ``workers`` are those registered, ``interval`` the seconds between two calls to one; 0: none are made."""

    def __init__(self, legs: Legs, workers: Callable[[], Iterable[Worker]], interval: float) -> None:
        self._legs, self._workers, self._interval = legs, workers, interval
        self._calls: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._run()) if interval else None

    async def close(self) -> None:
        """Ends it."""
        tasks = [*self._calls, *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            for worker in self._legs.health.due(self._workers(), self._interval, time.monotonic()):
                call = asyncio.create_task(self._call(worker))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _call(self, worker: Worker) -> None:
        well = await self._legs.is_healthy(worker)
        if self._legs.health.probed(worker.worker, time.monotonic(), well=well) and (count := self._legs.let_go(worker)):
            log.warning("%s is silent: its %d legs go elsewhere", worker.worker, count)
