"""Reads the workers, paced, and asks the rule (``router.scaling``) how many of them there should be; what /scaling answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

from cachebus.messages import Worker
from router.fleet import Fleet, candidates
from router.legs import Legs
from router.metrics import RouterMetrics
from router.readings import EngineReading, PoolReading, Readings, parse
from router.scaling import LOAD_SECONDS, Reading, Size, Sizes, State, decide
from router.scaling_settings import ScalingSettings

log = logging.getLogger("headstart.router")


@dataclass(frozen=True)
class _Own:
    """What this router's legs ever brought, by ``at``: seconds of prefill, of prompts at decode workers, and legs that ended."""

    at: float
    prefill_seconds: float
    decode_seconds: float
    ended: int


@dataclass(frozen=True)
class Surroundings:
    """What the scaler looks at beside the workers' own metrics.

    ``workers`` are those registered; ``waiting``: requests at the door; ``routers``: others on this bus, whose loads the fleet knows.
    """

    workers: Callable[[], Collection[Worker]]
    waiting: Callable[[], int]
    routers: Callable[[], int]
    prefill_tokens_min: int
    worker_requests_max: int


class Scaler:
    """One a router; ``start`` it where ``rule.reading_seconds`` is not 0. It decides whether or not anybody asks, so all who ask hear the same."""

    def __init__(self, rule: ScalingSettings, around: Surroundings, fleet: Fleet, metrics: RouterMetrics) -> None:
        self._rule, self._around, self._fleet, self._metrics = rule, around, fleet, metrics
        self._readings = Readings()
        self._state: State | None = None
        self._told: dict[str, Any] | None = None
        self._told_at = 0.0
        self._requests = self._lacking = 0
        self._seen: deque[tuple[float, int, int]] = deque()
        self._last: _Own | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, legs: Legs) -> None:
        """Begins to read."""
        if self._rule.reading_seconds:
            self._begin(self._run(legs))

    async def close(self) -> None:
        """Ends it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def prepared(self, missing_tokens: int) -> None:
        """A request's way is chosen, on which so many tokens of its prompt are computed."""
        self._requests += 1
        self._lacking += missing_tokens >= self._around.prefill_tokens_min

    def take(self, worker: str, reading: EngineReading) -> None:
        """A worker was read."""
        self._readings.take(worker, reading)

    def answer(self, now: float) -> dict[str, Any] | None:
        """Both pools' wanted sizes with their reasons and what they come from; None before the first decision, and where it is long past."""
        if self._told is None or now - self._told_at > 4 * self._rule.reading_seconds:
            return None
        return {**self._told, "age_seconds": round(now - self._told_at, 3)}

    def decide(self, now: float) -> None:
        """Looks at everything and decides."""
        workers = self._around.workers()
        self._readings.keep({worker.worker for worker in workers})
        prefill, decode = candidates(workers, "prefill", None), candidates(workers, "decode", None)
        full = self._rule.kv_blocks_used
        computing = self._readings.look((worker.worker for worker in prefill), full)
        decoding = self._readings.look((worker.worker for worker in decode), full)
        own = _Own(now, self._fleet.prefill_seconds, self._fleet.decode_seconds, self._fleet.ended.total())
        last, self._last = self._last or own, own
        passed = max(1e-9, now - last.at)
        share = self._own_share(own.ended - last.ended, computing.finished + decoding.finished, now)
        reading = Reading(
            prefill=len(prefill),
            decode=len(decode),
            backlog_seconds=self._backlog(prefill or decode, share, now),
            prompts=self._fleet.prompts(prefill or decode) / share,
            prefill_load=(own.prefill_seconds - last.prefill_seconds) / passed / share,
            decode_load=(own.decode_seconds - last.decode_seconds) / passed / share,
            lacking=self._lacking,
            places=(decoding.requests + self._around.waiting() / share) / self._around.worker_requests_max,
            kv_used=decoding.used * (1 + self._around.waiting() / share / max(1, decoding.running)),
            inter_token_seconds=decoding.inter_token_seconds,
            alone_seconds=self._fleet.alone_seconds,
        )
        self._state, sizes = decide(self._rule, self._state, reading, now)
        self._told, self._told_at = told(sizes, reading), now
        self._told["readings"] |= {
            "lacking_share": round(self._lacking / self._requests, 4) if self._requests else 0.0,
            "kv_blocks": decoding.blocks,
            "kv_blocks_free": decoding.free,
            "kv_blocks_wanted": self._fleet.blocks_wanted(),
            "own_share": round(share, 4),
        }
        self._requests = self._lacking = 0
        self._expose(sizes, decoding)

    def _own_share(self, own: int, everybodys: int, now: float) -> float:
        """What share of the legs at all workers is this router's: others may be there whose loads no bus tells. Both: ended since the last look."""
        self._seen.append((now, own, everybodys))
        while now - self._seen[0][0] >= LOAD_SECONDS:
            self._seen.popleft()
        ours, all_of_them = (sum(one[place] for one in self._seen) for place in (1, 2))
        return ours / all_of_them if 0 < ours < all_of_them else 1.0

    def _backlog(self, pool: Collection[Worker], share: float, now: float) -> float:
        own = self._fleet.prefill_backlog(pool, now)
        known = sum(self._fleet.load(worker.worker, now).backlog for worker in pool) if self._around.routers() else own
        return max(known, own / share)

    def _expose(self, sizes: Sizes, decoding: PoolReading) -> None:
        metrics = self._metrics
        metrics.kv_blocks_free.set(decoding.free)
        metrics.kv_blocks_wanted.set(self._fleet.blocks_wanted())
        metrics.inter_token_latency.set(decoding.inter_token_seconds or 0.0)
        metrics.wanted.labels("prefill").set(sizes.prefill.wanted)
        metrics.wanted.labels("decode").set(sizes.decode.wanted)

    async def _run(self, legs: Legs) -> None:
        while True:
            workers = list(self._around.workers())
            # Spread, since an exposition is large enough that many at once would be felt.
            for worker in workers:
                self._begin(self._read(legs, worker))
                await asyncio.sleep(self._rule.reading_seconds / len(workers))
            if not workers:
                await asyncio.sleep(self._rule.reading_seconds)
            before = self._told
            self.decide(time.monotonic())
            self._log(before, self._told)

    @staticmethod
    def _log(before: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
        for role in ("prefill", "decode"):
            if before is not None and now is not None and before[role]["wanted"] != now[role]["wanted"]:
                log.info("%d %s workers wanted: %s", now[role]["wanted"], role, "; ".join(now[role]["reasons"]))

    async def _read(self, legs: Legs, worker: Worker) -> None:
        exposition = await legs.metrics(worker)
        if exposition is not None:
            self.take(worker.worker, parse(exposition))

    def _begin(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def told(sizes: Sizes, reading: Reading) -> dict[str, Any]:
    """The answer: both pools with what is wanted, what there is and why; and what that comes from."""

    def pool(size: Size, ready: int) -> dict[str, Any]:
        return {"wanted": size.wanted, "ready": ready, "reasons": list(size.reasons)}

    values = {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(reading).items()}
    return {"prefill": pool(sizes.prefill, reading.prefill), "decode": pool(sizes.decode, reading.decode), "readings": values}
