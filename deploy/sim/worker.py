"""A simulated worker's life: engine, HTTP server, registration, drain. As ``cachebus.engine.worker_process`` has it for a real one."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from aiohttp import web

from cachebus.client import BusClient
from cachebus.engine.hbm_relay import HbmRelay
from cachebus.errors import BusError
from cachebus.holder import Holder
from cachebus.keeper import Keeper
from cachebus.messages import Drain, Leave, RegisterWorker, Request
from cachebus.ports import check_free, free_port, told_host
from cachebus.region import Region
from deploy.sim.api import Api, Tokens
from deploy.sim.engine import EngineSpec, SimulatedEngine

log = logging.getLogger("headstart.sim")

BUS_MS_MAX = 5000
_WATCH_SECONDS = 0.05
_IDLE_LOOKS = 3
"""A router that had not heard of the drain may have sent one more request."""
_BACKLOG = 2048


@dataclass(frozen=True)
class Place:
    """Where a worker listens (``port`` 0: a free one) and how long it may drain."""

    host: str
    port: int
    drain_seconds_max: int


class SimulatedWorker:
    """One worker in this process's event loop. ``start``, then ``drain`` when it is to end."""

    def __init__(self, spec: EngineSpec, place: Place, region: Region) -> None:
        self._spec, self._place, self._region = spec, place, region
        self._holder = Holder(spec.run_dir)
        self._client = BusClient(spec.run_dir, f"{spec.worker} supervisor", self._holder)

    @property
    def failed(self) -> bool:
        """Whether its engine died."""
        return self._engine.failed.is_set()

    async def start(self) -> None:
        """Returns when routers may send requests. Raises BusError where the bus is absent or refuses it, HeadstartError for a taken port."""
        spec, place = self._spec, self._place
        if place.port:
            check_free("--port", place.host, place.port)
        port = place.port or free_port(place.host)
        tokens = Tokens(asyncio.get_running_loop())
        self._engine = SimulatedEngine(spec, self._holder, self._region, tokens.deliver)
        self._engine.start()
        self._api = Api(self._engine, tokens, spec.profile)
        self._runner = web.AppRunner(self._api.application(), handler_cancellation=True, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, place.host, port, backlog=_BACKLOG).start()
        registration: Request = RegisterWorker(
            worker=spec.worker,
            role=spec.role,
            holder=self._holder.id,
            url=f"http://{told_host(place.host)}:{port}",
            model=spec.profile.model,
            max_model_len=spec.profile.max_model_len,
            takes_prompt_token_ids=True,
        )
        epoch = self._client.connect(BUS_MS_MAX).epoch
        self._client.call(registration, BUS_MS_MAX)
        self._keeper = Keeper(spec.run_dir, spec.worker, self._holder, lambda: registration, epoch)
        self._keeper.start()
        self._relay = HbmRelay(spec.run_dir, spec.worker, self._holder, lambda: self._engine.kv_events)
        if spec.cache.hbm_events:
            self._relay.start()
        log.info("%s ready: %s at http://%s:%d", spec.worker, spec.profile.model, place.host, port)

    async def drain(self, forced: asyncio.Event) -> None:
        """Tells routers, lets running requests end unless ``forced``, and leaves."""
        self._tell(Drain(self._spec.worker))
        deadline = time.monotonic() + self._place.drain_seconds_max
        idle_looks = 0
        while idle_looks < _IDLE_LOOKS and time.monotonic() < deadline and not forced.is_set():
            idle_looks = 0 if self._api.in_flight else idle_looks + 1
            await asyncio.sleep(_WATCH_SECONDS)
        await self.leave()

    async def leave(self) -> None:
        """Ends the worker with what it still has."""
        await self._runner.cleanup()
        await asyncio.to_thread(self._keeper.stop)
        await asyncio.to_thread(self._relay.stop)
        self._tell(Leave(self._spec.worker))
        await asyncio.to_thread(self._engine.stop)
        self._client.close()
        self._holder.close()

    def _tell(self, message: Drain | Leave) -> None:
        try:
            self._client.call(message, BUS_MS_MAX)
        except BusError as error:
            log.warning("can't tell the bus that %s ends: %s", self._spec.worker, error)
