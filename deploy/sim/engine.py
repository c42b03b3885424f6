"""A simulated engine: the real connector's two halves around a scheduler and a model that only take their time. One thread, as an engine core has.

A step is computed at once and ends when the profile says, so what arrives meanwhile waits, pulls go on beside it, and saves run into the next one.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachebus.client import BusClient
from cachebus.engine.mover import IDLE_WAIT_SECONDS, Mover, took_since
from cachebus.engine.publisher import CONNECT_MS_MAX, Publisher
from cachebus.engine.scheduler_half import SchedulerHalf
from cachebus.engine.transfer import TransferParams
from cachebus.engine.views import Policy, RequestView
from cachebus.holder import Holder
from cachebus.keeper import Keeper
from cachebus.keys import namespace_digest
from cachebus.messages import Reattach, RegisterEngine
from cachebus.region import Region
from cachebus.settings import CacheSettings
from cachebus.table import LAYOUT_BYTES
from cachebus.wire import Role
from deploy.sim.kv_events import KvEvents, LocalStream
from deploy.sim.model import Model
from deploy.sim.profile import Profile
from deploy.sim.scheduler import Scheduler, Step, Work

_LOOKUP_SECONDS = 0.001
"""How often an engine with nothing to compute asks whether a lookup was answered."""


@dataclass(frozen=True)
class EngineSpec:
    """What decides how an engine is. ``speed`` divides its times; ``verify``: whether pulls are checked."""

    worker: str
    role: Role
    run_dir: Path
    profile: Profile
    speed: float
    cache: CacheSettings
    verify: bool


@dataclass(frozen=True)
class Ask:
    """A request for an engine. ``tokens`` is its prompt; it grows as the engine generates."""

    request_id: str
    tokens: list[int]
    max_tokens: int
    salt: str = ""
    transfer: TransferParams | None = None


@dataclass(frozen=True)
class Sampled:
    """A token for a request. ``cached_tokens`` of the prompt were not computed by this engine."""

    request_id: str
    token: int
    cached_tokens: int


Deliver = Callable[[Sequence[Sampled]], None]


class SimulatedEngine(threading.Thread):
    """Registers itself when made; raises BusError where the bus is not there or refuses it. ``deliver`` is called on the engine's thread.

    ``failed`` is set when the thread ended with an exception. ``counts`` are for its metrics, seconds as they passed on the clock.
    """

    def __init__(self, spec: EngineSpec, holder: Holder, region: Region, deliver: Deliver) -> None:
        super().__init__(name=f"engine-{spec.worker}", daemon=True)
        self._spec, self._deliver, self._holder = spec, deliver, holder
        self._commands: queue.SimpleQueue[Ask | str | None] = queue.SimpleQueue()
        self.failed = threading.Event()
        names = ("sim_computed_prompt_tokens", "sim_step_seconds", "sim_late_seconds", "sim_token_seconds", "sim_tokens", "sim_ended_requests")
        self.counts: dict[str, float] = dict.fromkeys(names, 0)
        self._token_at: dict[str, float] = {}
        self.model = Model(spec.profile, spec.speed)
        self._client = BusClient(spec.run_dir, f"{spec.worker} scheduler", holder)
        welcome = self._client.connect(CONNECT_MS_MAX)
        registration = registered_as(spec, holder.id, self.model.block_bytes)
        self._client.call(registration, CONNECT_MS_MAX)
        timing, hold_ms = spec.cache.promote_ms_max, spec.cache.hold_ms
        self.mover = Mover(spec.run_dir, holder, spec.worker, self.model, region, verify=spec.verify, wait_ms_max=timing, take_offers=hold_ms > 0)
        self.publisher = Publisher(spec.run_dir, holder, spec.worker, registration.layout, self.model, region, offer=hold_ms > 0)
        self._half = SchedulerHalf(_policy(spec, registration, self.model.block_bytes), self._client)
        self._events = KvEvents(spec.profile.block_size)
        self.kv_events = LocalStream()
        self._scheduler = Scheduler(spec.profile, self._half, self._events)

        def reattach() -> Reattach:
            return Reattach(holder.id, self.mover.reading(), self.publisher.writing)

        self._keepers = [
            Keeper(spec.run_dir, f"{spec.worker} engine", holder, lambda: registration, welcome.epoch),
            Keeper(spec.run_dir, f"{spec.worker} worker", holder, reattach, welcome.epoch),
        ]
        self.mover.start()
        for keeper in self._keepers:
            keeper.start()

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run and that wait."""
        return self._scheduler.running, self._scheduler.waiting + self._commands.qsize()

    @property
    def kv_used(self) -> float:
        """Share of the KV blocks that requests hold."""
        return 1 - self._scheduler.pool.free / self._spec.profile.blocks

    def submit(self, ask: Ask) -> None:
        """A request arrived. Any thread may call it."""
        self._commands.put(ask)

    def abort(self, request_id: str) -> None:
        """Its client left; one that has ended, or never came, is passed over. Any thread may call it."""
        self._commands.put(request_id)

    def stop(self) -> None:
        """Ends the thread after its step, with what it still has."""
        self._commands.put(None)
        self.join()
        for keeper in self._keepers:
            keeper.stop()
        self.mover.stop()
        self.publisher.close()
        self._client.close()

    def run(self) -> None:
        try:
            while self._take_commands():
                self._turn()
        except BaseException:
            self.failed.set()
            raise

    def _turn(self) -> None:
        """One step, or a moment of waiting where there is nothing to compute."""
        started = time.perf_counter()
        step = self._scheduler.schedule(time.monotonic() * 1000)
        for request_id in step.preempted:
            self.model.forget(request_id)
        plan = self._half.step([part.scheduled for part in step.parts], step.preempted)
        plan.let_go = self._half.holds.over(time.monotonic() * 1000)
        self.publisher.begin(plan)
        for load in plan.loads:
            self.mover.submit(load, self.model.computed())
        if step.parts:
            sampled = self.model.forward(step.parts)
            seconds = self._seconds(step)
            time.sleep(max(0.0, started + seconds - time.perf_counter()))
            self._count(step, seconds, time.perf_counter() - started)
        self.publisher.finish()
        self._half.took(took_since(self.publisher, self.mover), time.monotonic() * 1000)
        self._end_loads(may_wait=not step.parts)
        for request_id in plan.let_go:
            self._scheduler.let_go(request_id)
        if step.parts:
            self._hand_over(step, sampled)
        elif not self._scheduler.loading and (self._scheduler.waiting or self._scheduler.keeping):
            time.sleep(_LOOKUP_SECONDS)
        batch = self._events.batch(time.time())
        if batch is not None and self._spec.cache.hbm_events:
            self.kv_events.put(batch)

    def _end_loads(self, *, may_wait: bool) -> None:
        finished, invalid = self.mover.take_finished(IDLE_WAIT_SECONDS if may_wait and self._scheduler.loading else 0)
        for request_id in finished:
            self._scheduler.load_finished(request_id, invalid)

    def _hand_over(self, step: Step, sampled: Sequence[int | None]) -> None:
        ended = self._scheduler.advance(step, sampled)
        self._count_tokens(step, sampled)
        for work in ended:
            self.model.forget(work.request_id)
            del self._token_at[work.request_id]
        self.counts["sim_ended_requests"] += len(ended)
        found = [
            Sampled(part.work.request_id, token, part.work.cached_tokens)
            for part, token in zip(step.parts, sampled, strict=True)
            if token is not None
        ]
        if found:
            self._deliver(found)

    def _count_tokens(self, step: Step, sampled: Sequence[int | None]) -> None:
        now = time.perf_counter()
        for part, token in zip(step.parts, sampled, strict=True):
            if token is None:
                continue
            before = self._token_at.get(part.work.request_id)
            if before is not None:
                self.counts["sim_token_seconds"] += now - before
                self.counts["sim_tokens"] += 1
            self._token_at[part.work.request_id] = now

    def _count(self, step: Step, planned: float, taken: float) -> None:
        ends = ((part, min(part.computed + part.tokens, part.work.prompt_tokens)) for part in step.parts)
        self.counts["sim_computed_prompt_tokens"] += sum(max(0, end - part.computed) for part, end in ends)
        self.counts["sim_step_seconds"] += planned
        self.counts["sim_late_seconds"] += taken - planned

    def _take_commands(self) -> bool:
        """Takes what has arrived, waiting for it where there is nothing else to do; False where the engine is to end."""
        idle = not self._scheduler.running and not self._scheduler.waiting and not self._scheduler.keeping
        while idle or not self._commands.empty():
            command = self._commands.get()
            idle = False
            if command is None:
                return False
            if isinstance(command, str):
                self._scheduler.abort(command)
                self._token_at.pop(command, None)
                self.model.forget(command)
            else:
                self._add(command)
        return True

    def _add(self, ask: Ask) -> None:
        work = Work(ask.request_id, ask.tokens, ask.max_tokens, ask.salt)
        self._half.add(RequestView(ask.request_id, work.tokens, work.prompt_tokens, ask.salt, True, ask.transfer))
        self._scheduler.add(work)

    def _seconds(self, step: Step) -> float:
        prefill = [(part.computed, part.tokens) for part in step.parts if part.computed < part.work.prompt_tokens]
        decode = [part.computed for part in step.parts if part.computed >= part.work.prompt_tokens]
        return self._spec.profile.step_seconds(prefill, decode) / self._spec.speed


def registered_as(spec: EngineSpec, holder: str, block_bytes: int) -> RegisterEngine:
    """How the engine is made known to the bus: what its bytes mean is its model, how they lie its profile."""
    profile, chunk_size = spec.profile, spec.cache.chunk_size
    meaning = {"weights": profile.model, "KV dtype": "chain", "engine": "headstart sim"}
    layout = {"block size": str(profile.block_size), "layers": str(profile.layers), "element type": "uint64", "block shape": f"[{block_bytes}]"}
    return RegisterEngine(
        worker=spec.worker,
        role=spec.role,
        holder=holder,
        model=profile.model,
        namespace=namespace_digest(meaning),
        namespace_parts=meaning,
        layout=namespace_digest(layout)[:LAYOUT_BYTES],
        layout_parts=layout,
        block_size=profile.block_size,
        chunk_size=chunk_size,
        chunk_bytes=block_bytes * (chunk_size // profile.block_size),
    )


def _policy(spec: EngineSpec, registration: RegisterEngine, block_bytes: int) -> Policy:
    cache = spec.cache
    return Policy(
        worker=spec.worker,
        holders=[registration.holder],
        namespace=registration.namespace,
        layout=registration.layout,
        chunk_size=cache.chunk_size,
        block_size=registration.block_size,
        save_decode_cache=cache.save_decode_cache,
        lookup_ms_max=cache.lookup_ms_max,
        pull_tokens_min=cache.pull_tokens_min,
        hold_ms=cache.hold_ms,
        hold_blocks_max=int(cache.handover_hold_gb * 1e9 / block_bytes),
    )
