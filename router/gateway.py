"""Everything that a router's requests share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from cachebus.client import BusClient
from cachebus.colleagues import Colleagues
from cachebus.errors import BusUnavailable, HeadstartError
from cachebus.messages import Event, Report, Stored, Worker, WorkerDown, WorkerUp
from cachebus.messages_routers import Spent
from cachebus.messages_tools import Cleared
from cachebus.tenants import TenantsFile
from cachebus.watch import Watch
from router.admission import Admission
from router.dispatch import Dispatcher, Route
from router.door import Door
from router.errors import ApiError
from router.fleet import Fleet, candidates, serves
from router.legs import Legs
from router.lengths import Lengths
from router.limits import Limiter
from router.metrics import RouterMetrics
from router.policies import Ask, Chosen
from router.probes import Probes
from router.recent import Recent, Tracing
from router.remembered import Remembered
from router.retries import RetryBudget
from router.scaler import Scaler, Surroundings
from router.scaling_settings import ScalingSettings
from router.settings import RouterSettings

BUS_SECONDS_MAX = 10.0
_RETRY_SECONDS = 1


class Gateway:
    """Made once a router; ``start`` before the first request, ``close`` after the last."""

    def __init__(
        self,
        settings: RouterSettings,
        run_dir: Path,
        tenants_file: str = "",
        tracing: Tracing | None = None,
        scaling: ScalingSettings | None = None,
    ) -> None:
        self.settings = settings
        self._run_dir, self._tenants_file = run_dir, tenants_file
        self.tenants: TenantsFile | None = None
        self.limiter = Limiter()
        self.metrics = RouterMetrics()
        self.recent = Recent(tracing)
        self.fleet = Fleet(settings.prefill_tokens_min)
        self.lengths = Lengths()
        self.remembered = Remembered()
        self.retries = RetryBudget(time.monotonic())
        self.door = Door(Admission(settings.queue_max, settings.queue_seconds_max), self._running_max, settings.requests_max + settings.queue_max)
        self.requests = 0
        """Requests under way, those that wait and refused ones included."""
        self._had_prefill: set[str] = set()
        self.watch = Watch(run_dir, self._heard)
        self.colleagues = Colleagues(run_dir, lambda: self.fleet.told(time.monotonic()), _Limits(self))
        self.fleet.others = lambda: self.colleagues.loads
        limits = settings.prefill_tokens_min, settings.worker_requests_max
        around = Surroundings(self._registered, lambda: self.door.waiting, lambda: self.colleagues.count, *limits)
        self.scaler = Scaler(scaling or ScalingSettings(), around, self.fleet, self.metrics)

    async def start(self) -> None:
        """Connects to the bus. Raises BusUnavailable, and SettingsError where the tenants' file is not right."""
        self.legs = Legs(self.settings.connect_seconds_max, self.fleet.health)
        self.probes = Probes(self.legs, self._registered, self.settings.health_ms / 1000)
        self.dispatcher = Dispatcher(self.settings, self.watch, self.colleagues, self.fleet, self.legs, self.metrics, self.retries)
        try:
            await self.watch.start(BUS_SECONDS_MAX)
        except BusUnavailable:
            await self.probes.close()
            await self.legs.close()
            raise
        await self.colleagues.start()
        self.scaler.start(self.legs)
        if self._tenants_file:
            try:
                self.tenants = TenantsFile(Path(self._tenants_file), await asyncio.to_thread(_digest_key, self._run_dir))
            except HeadstartError:
                await self.close()
                raise

    async def close(self) -> None:
        """Lets go of the bus and the workers."""
        await self.scaler.close()
        await self.colleagues.close()
        await self.watch.close()
        await self.probes.close()
        await self.legs.close()
        if self.recent.tracing is not None:
            await self.recent.tracing.close()

    def _registered(self) -> Collection[Worker]:
        """The workers of now: a snapshot brings a table of its own."""
        return self.watch.replica.workers.values()

    def _running_max(self) -> int:
        """How many requests may be under way; where there are no workers each is to hear that."""
        workers = sum(worker.role == "decode" and not worker.draining for worker in self._registered())
        return min(self.settings.requests_max, max(1, workers) * self.settings.worker_requests_max)

    def check_prefill(self, route: Route) -> None:
        """Raises ApiError (503) where a prompt that is too long for decode would be computed there because all prefill workers are gone.

        A model that never had any, as far as this router knows, is one whose decode workers are meant to compute prompts.
        """
        model, limit = route.ask.model, self.settings.decode_tokens_max
        if route.through_prefill or not route.ways or route.ways[0].tokens <= limit or model not in self._had_prefill:
            return
        if not candidates(self.fleet.health.usable(self._registered(), time.monotonic()), "prefill", model):
            text = f"no prefill worker is ready, and the prompt lacks more tokens than decode workers compute (router.decode_tokens_max: {limit})"
            raise ApiError(503, text, code="no_prefill_worker", retry_seconds=_RETRY_SECONDS)

    @property
    def ready(self) -> bool:
        """Whether a request could be answered now."""
        return self.watch.connected and any(w.role == "decode" and not w.draining for w in self.watch.replica.workers.values())

    def any_decode_worker(self, model: str | None, without: Collection[str] = ()) -> Worker:
        """A decode worker that serves the model, to ask it something. Raises ApiError (404, 503)."""
        workers = [w for w in self.watch.replica.workers.values() if w.role == "decode"]
        if workers and model is not None and not any(serves(w, model) for w in workers):
            raise ApiError(404, f"The model `{model}` does not exist.", code="model_not_found", param="model")
        able = candidates(self.fleet.health.usable(workers, time.monotonic()), "decode", model, without)
        if not able:
            raise ApiError(503, "no decode worker is ready", code="no_decode_worker", retry_seconds=_RETRY_SECONDS)
        return min(able, key=lambda w: self.fleet.in_flight[w.worker])

    def choose_decode_worker(self, ask: Ask, without: Collection[str]) -> Chosen:
        """The decode worker for a leg. Raises ApiError (502, 503)."""
        chosen = self.dispatcher.policy.worker("decode", ask, without, time.monotonic())
        if chosen is not None:
            return chosen
        if without:
            raise ApiError(502, "every decode worker failed to answer", code="workers_failed", retry_seconds=_RETRY_SECONDS)
        raise ApiError(503, "no decode worker is ready", code="no_decode_worker", retry_seconds=_RETRY_SECONDS)

    def _heard(self, event: Event) -> None:
        if isinstance(event, Report):
            worker = self.watch.replica.workers.get(event.worker)
            if worker is not None:
                self.dispatcher.learnt.take(event, worker.model)
            self.dispatcher.reports.deliver(event)
        elif isinstance(event, Cleared):
            self.remembered.clear(event.tenant)
        elif isinstance(event, Stored | WorkerUp | WorkerDown):
            if isinstance(event, WorkerDown):
                self.dispatcher.learnt.forget(event.worker)
            if isinstance(event, WorkerUp):
                if event.worker.role == "prefill":
                    self._had_prefill.update((event.worker.model, *event.worker.adapters))
                self.door.look()
            self.dispatcher.flights.wake()


class _Limits:
    """A router's limiter, as other routers tell it and are told by it."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def own(self) -> dict[str, Spent] | None:
        tenants = self._gateway.tenants
        limited = tenants is not None and any(t.requests_per_minute or t.tokens_per_minute for t in tenants.now.named.values())
        return self._gateway.limiter.told(time.monotonic()) if limited else None

    def others(self, spent: Mapping[str, Mapping[str, Spent]]) -> None:
        self._gateway.limiter.hear(spent, time.monotonic())


def _digest_key(run_dir: Path) -> bytes:
    """The cluster's. Raises BusUnavailable."""
    client = BusClient(run_dir, "router")
    try:
        return client.connect(int(BUS_SECONDS_MAX * 1000)).digest_key
    finally:
        client.close()
