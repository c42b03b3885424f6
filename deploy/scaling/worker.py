"""A simulated worker in simulated time: the scheduler of ``headstart sim``, driven by events instead of a thread.

A token of the simulation stands for ``GRAIN`` of the engine, in prompts and answers, so that a day takes minutes. A request's first token is exact;
each later one stands for ``GRAIN`` steps of decoding. What arrives waits for the end of such a step, which makes it later than it would be.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from cachebus.messages import Worker
from cachebus.wire import Role
from deploy.scaling.store import Store, StoreConnector, Unheard
from deploy.sim.profile import Profile
from deploy.sim.scheduler import Scheduler, Step, Work
from router.readings import EngineReading

GRAIN = 16
BLOCK_TOKENS = 512
"""A block of the trace, and of simulated HBM."""


def coarse(profile: Profile) -> Profile:
    """The profile of tokens that stand for ``GRAIN`` each."""
    return msgspec.structs.replace(
        profile,
        block_size=BLOCK_TOKENS // GRAIN,
        blocks=profile.blocks * profile.block_size // BLOCK_TOKENS,
        max_model_len=profile.max_model_len // GRAIN,
        max_num_batched_tokens=max(1, profile.max_num_batched_tokens // GRAIN),
        kv_bytes_per_token=profile.kv_bytes_per_token * GRAIN,
        prefill_tokens_per_second=tuple((x / GRAIN, y / GRAIN) for x, y in profile.prefill_tokens_per_second),
        attention_ns_per_pair=profile.attention_ns_per_pair * GRAIN**2,
        # As many steps of decoding, each with its own fixed time, but for the one that every step of the simulation has anyway.
        decode_ms=tuple((x, GRAIN * (y + profile.step_ms) - profile.step_ms) for x, y in profile.decode_ms),
        decode_ns_per_context_token=profile.decode_ns_per_context_token * GRAIN**2,
    )


class Events:
    """What is to happen, in the order of its time; what is due at once happens in the order in which it was planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Plans something."""
        heapq.heappush(self._queue, (when, next(self._number), what))

    def next(self) -> bool:
        """Lets the next thing happen; False where nothing is planned."""
        if not self._queue:
            return False
        self.now, _, what = heapq.heappop(self._queue)
        what()
        return True


@dataclass
class Counts:
    """What an engine's metrics count, for readings."""

    finished: int = 0
    token_seconds: float = 0.0
    tokens: int = 0


class SimulatedWorker:
    """One worker. ``first`` and ``ended`` are told of a request's first token and of its end; ``busy_seconds``: how long it computed."""

    def __init__(self, role: Role, name: str, profile: Profile, store: Store, events: Events) -> None:
        self.role, self.name = role, name
        self.first: Callable[[str], None] = _nothing
        self.ended: Callable[[str], None] = _nothing
        self.busy_seconds = 0.0
        self._profile, self._store, self._events = profile, store, events
        self._connector = StoreConnector(store, profile.block_size, self._pull)
        self.scheduler = Scheduler(profile, self._connector, Unheard(profile.block_size))
        self._counts = Counts()
        self._token_at: dict[str, float] = {}
        self._computing = False

    def registered(self) -> Worker:
        """As routers know it."""
        size = self._profile.block_size
        return Worker(self.name, self.role, "", self._profile.model, b"", size, size, self._profile.max_model_len, True)

    @property
    def idle(self) -> bool:
        """Whether it has no request."""
        return not self._connector.works

    def reading(self) -> EngineReading:
        """What its metrics say."""
        blocks, count = self._profile.blocks, self._counts
        used = 1 - self.scheduler.pool.free / blocks
        running, waiting = self.scheduler.running, self.scheduler.waiting
        return EngineReading(used, blocks, running, waiting, count.finished, count.token_seconds, count.tokens)

    def add(self, request_id: str, tokens: list[int], max_tokens: int, names: list[bytes]) -> None:
        """A request arrived; ``names``: of its prompt's full blocks."""
        work = Work(request_id, tokens, max_tokens, names=names)
        self._connector.works[request_id] = work
        self.scheduler.add(work)
        self._go_on()

    def _go_on(self) -> None:
        if self._computing:
            return
        step = self.scheduler.schedule(self._events.now * 1000)
        if not step.parts:
            return
        self._computing = True
        prompts = [(part.computed, part.tokens) for part in step.parts if part.computed < part.work.prompt_tokens]
        contexts = [part.computed for part in step.parts if part.computed >= part.work.prompt_tokens]
        seconds = self._profile.step_seconds(prompts, contexts)
        self.busy_seconds += seconds
        self._events.at(self._events.now + seconds, lambda: self._finish(step))

    def _finish(self, step: Step) -> None:
        self._computing = False
        now = self._events.now
        sampling = [part.work for part in step.parts if part.samples]
        ended = self.scheduler.advance(step, [0 if part.samples else None for part in step.parts])
        for work in sampling:
            before = self._token_at.get(work.request_id)
            if before is None:
                # All full blocks of the prompt can be pulled from now on.
                self._store.publish(work.names[: work.prompt_tokens // self._profile.block_size])
                self.first(work.request_id)
            else:
                self._counts.token_seconds += now - before
                self._counts.tokens += GRAIN
            self._token_at[work.request_id] = now
        for work in ended:
            self._counts.finished += 1
            del self._token_at[work.request_id]
            self.ended(work.request_id)
        self._go_on()

    def _pull(self, request_id: str, tokens: int) -> None:
        def pulled() -> None:
            self.scheduler.load_finished(request_id, ())
            self._go_on()

        self._events.at(self._events.now + self._profile.pull_seconds(tokens), pulled)


def _nothing(request_id: str) -> None:
    pass
