"""Which way a prompt goes: straight to decode, or through prefill first, and who waits for whom."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cachebus.keys import chunk_keys, root_key
from cachebus.messages import Report, Worker
from cachebus.watch import Watch
from router.fleet import Fleet, candidates, warmest
from router.flights import Flight, Flights
from router.legs import LegBroken, LegFailed, Legs
from router.metrics import RouterMetrics
from router.reports import Reports, arrived
from router.settings import RouterSettings

log = logging.getLogger("headstart.router")

PREFILL_ATTEMPTS = 2
ROUNDS_MAX = 16
_SETTLE_SECONDS_MAX = 1.0


@dataclass(frozen=True)
class Route:
    """How a request's prompt was prepared. ``keys`` are its chunks, ``prefill`` is the prefill leg's report.

    ``flight`` is the request's own decode leg where others may be waiting for it; it ends with the first token.
    """

    through_prefill: bool
    keys: Sequence[bytes] = ()
    prefill: Report | None = None
    flight: Flight | None = None

    @property
    def name(self) -> str:
        """The value of x-headstart-route."""
        return "prefill+decode" if self.through_prefill else "decode"


class Dispatcher:
    """Decides and runs prefill legs."""

    def __init__(self, settings: RouterSettings, watch: Watch, fleet: Fleet, legs: Legs, metrics: RouterMetrics) -> None:
        self._settings, self._watch, self._fleet, self._legs, self._metrics = settings, watch, fleet, legs, metrics
        self.flights = Flights(watch.replica)
        self.reports = Reports()

    async def prepare(self, worker: Worker, token_ids: Sequence[int], request_id: str) -> Route:
        """Returns when the decode leg may start. ``worker`` is any that serves the model: all share its namespace.

        A prompt of which little is missing, in the store or in the HBM of the decode worker that would take it now, goes straight to
        decode. One that somebody is computing waits for that. Any other is computed by a prefill worker, or by its own decode worker
        where there is none.
        """
        replica, limits = self._watch.replica, self._settings
        if len(token_ids) >= worker.max_model_len:
            # No prefill helps a prompt that the engine will refuse in its own words.
            return Route(False)
        keys = chunk_keys(root_key(worker.namespace), token_ids, worker.chunk_size)
        deadline = time.monotonic() + limits.single_flight_seconds_max
        for _ in range(ROUNDS_MAX):
            known = replica.known_prefix(keys)
            missing = len(token_ids) - known * worker.chunk_size
            in_hbm = self._in_hbm(worker.model, keys)
            if len(token_ids) - max(known, in_hbm) * worker.chunk_size < limits.prefill_tokens_min:
                return Route(False, keys)
            under_way = self.flights.covering(keys, known)
            # Waiting for a small part of what is missing would only delay the rest.
            if under_way is None or 2 * under_way[1] * worker.chunk_size < missing or time.monotonic() >= deadline:
                break
            flight, count = under_way
            await self.flights.wait(flight, keys, known + count, deadline - time.monotonic())
            if flight.ended and not flight.computed:
                # Its leader, if it is still there, was woken together with us: it goes on with its own decode worker, and we follow.
                await asyncio.sleep(0)
            elif flight.computed:
                await self.flights.settled(keys[: known + count], _SETTLE_SECONDS_MAX)
                if replica.known_prefix(keys) <= known:
                    # Nothing of it was kept: to wait for the next in line would only make a queue of all.
                    return Route(False, keys)
        wanted = keys[known:]
        if not candidates(replica.workers.values(), "prefill", worker.model):
            return Route(False, keys, flight=self.flights.start(wanted, None))
        flight = self.flights.start(wanted, self._prefill(worker.model, token_ids, keys, known, request_id))
        assert flight.task is not None
        try:
            await asyncio.wait([flight.task])
            return Route(True, keys, prefill=flight.task.result())
        except LegFailed as error:
            log.warning("request %s: %s; its decode worker computes the prompt", request_id, error)
            return Route(False, keys, flight=self.flights.start(wanted, None))
        finally:
            flight.leave()

    def hbm_chunks(self, keys: Sequence[bytes]) -> dict[str, int]:
        """How many of ``keys``, from the first on, lie in whose HBM; nothing where the policy does not look at that."""
        return self._watch.replica.hbm_prefixes(keys) if self._settings.policy == "hbm_affinity" else {}

    def _in_hbm(self, model: str, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on, lie in the HBM of the decode worker that would be chosen now."""
        chunks = self.hbm_chunks(keys)
        able = candidates(self._watch.replica.workers.values(), "decode", model)
        return max((chunks.get(w.worker, 0) for w in warmest(able, self._fleet.in_flight, chunks)), default=0)

    async def _prefill(self, model: str, token_ids: Sequence[int], keys: Sequence[bytes], known: int, request_id: str) -> Report | None:
        """Has the prompt of ``keys`` computed, of which the first ``known`` are stored."""
        tried: set[str] = set()
        for _ in range(PREFILL_ATTEMPTS):
            worker = self._fleet.choose(self._watch.replica.workers.values(), "prefill", model, tried, self.hbm_chunks(keys))
            if worker is None:
                break
            tried.add(worker.worker)
            transfer_id = secrets.token_hex(8)
            report = self.reports.expect(transfer_id)
            self._fleet.in_flight[worker.worker] += 1
            outcome = "aborted"
            try:
                await self._legs.prefill(worker, token_ids, transfer_id, request_id)
                outcome = "done"
                await self.flights.settled(keys[known:], _SETTLE_SECONDS_MAX)
                return await arrived(report, self._settings.report_ms_max)
            except (LegFailed, *LegBroken) as error:
                outcome = "failed"
                log.warning("request %s: prefill on %s failed: %s", request_id, worker.worker, error or type(error).__name__)
            finally:
                self._metrics.prefills.labels(outcome).inc()
                self._fleet.in_flight[worker.worker] -= 1
                self.reports.forget(transfer_id)
        raise LegFailed(f"no prefill worker could compute the prompt ({len(tried)} tried)")
