"""A simulated engine's scheduler: continuous batching over bounded blocks, as vLLM's does it. A plain state machine.

A step takes first the requests that run, then those that wait, up to ``max_num_batched_tokens``; a long prompt is computed in parts. Where blocks
run out the request that began last is preempted and starts again. ``Connector`` is the connector's scheduler half.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from cachebus.engine.views import Scheduled
from cachebus.keys import extend_chunk_keys, root_key
from deploy.sim.block_pool import BlockPool
from deploy.sim.kv_events import KvEvents
from deploy.sim.profile import Profile


class Connector(Protocol):
    """What the scheduler asks the cache; see ``cachebus.engine.scheduler_half``."""

    def matched(self, request_id: str, local_tokens: int, now_ms: float, free_blocks: int) -> int | None:
        """How many tokens after the local ones can be pulled; None: ask again later."""

    def loaded(self, request_ids: Sequence[str]) -> None:
        """These requests' pulls ended."""

    def allocated(self, request_id: str, blocks: Sequence[int], external_tokens: int) -> None:
        """The request has its blocks; ``external_tokens`` are to be pulled into them."""

    def finished(self, request_id: str, *, whole: bool = False) -> bool:
        """The request ended; ``whole``: as it was to. True: its blocks stay until ``let_go``."""


class Phase(Enum):
    """Where a request is."""

    WAITING = "waits for blocks, for its turn or for a lookup"
    LOADING = "its prefix is being pulled"
    RUNNING = "takes part in steps"
    ABORTED = "its client left while its prefix was being pulled"


@dataclass(eq=False)
class Work:
    """A request in the engine. ``tokens`` grows as it generates; the KV of the first ``computed`` ones is in ``blocks``."""

    request_id: str
    tokens: list[int]
    max_tokens: int
    salt: str = ""
    prompt_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    phase: Phase = Phase.WAITING
    loaded: bool = False
    cached_tokens: int = 0
    names: list[bytes] = field(default_factory=list)
    remembered: int = 0

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens


@dataclass(frozen=True)
class Part:
    """A request's share of a step: its tokens ``computed`` to ``computed + tokens``."""

    work: Work
    computed: int
    tokens: int
    scheduled: Scheduled

    @property
    def samples(self) -> bool:
        """Whether the step ends at the request's last token, so that the next one is known."""
        return self.computed + self.tokens == len(self.work.tokens)


@dataclass
class Step:
    """What is computed next, and who lost its blocks for it."""

    parts: list[Part] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)


class Scheduler:
    """See the module. Sizes are tokens."""

    def __init__(self, profile: Profile, connector: Connector, events: KvEvents) -> None:
        self.pool = BlockPool(profile.blocks, events)
        self._connector, self._events = connector, events
        self._block_size, self._tokens_max, self._seqs_max = profile.block_size, profile.max_num_batched_tokens, profile.max_num_seqs
        self._works: dict[str, Work] = {}
        self._waiting: list[Work] = []
        self._running: list[Work] = []
        self._kept: dict[str, list[int]] = {}

    @property
    def running(self) -> int:
        """Requests that take part in steps."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that don't yet, those whose prefix is being pulled included."""
        return len(self._works) - len(self._running)

    @property
    def loading(self) -> bool:
        """Whether any prefix is being pulled."""
        return any(work.phase in (Phase.LOADING, Phase.ABORTED) for work in self._works.values())

    @property
    def keeping(self) -> bool:
        """Whether blocks of requests that have ended are kept for who reads them."""
        return bool(self._kept)

    def add(self, work: Work) -> None:
        """A request arrived."""
        self._works[work.request_id] = work
        self._waiting.append(work)

    def schedule(self, now_ms: float) -> Step:
        """The next step; without parts where nothing can be computed now."""
        step = Step()
        budget = self._tokens_max
        for work in list(self._running):
            tokens = min(len(work.tokens) - work.computed, budget)
            if work.phase is not Phase.RUNNING or not tokens:
                continue
            fresh = self._grown(work, tokens, step)
            if fresh is not None:
                step.parts.append(_part(work, tokens, fresh, restarted=False))
                budget -= tokens
        if not step.preempted:
            self._admit(step, budget, now_ms)
        if not self._works_on(step):
            self._break_up(step)
        return step

    def advance(self, step: Step, sampled: Sequence[int | None]) -> list[Work]:
        """The step was computed; ``sampled`` has a token for each part that samples. Returns the requests that ended."""
        ended = []
        for part, token in zip(step.parts, sampled, strict=True):
            work = part.work
            work.computed += part.tokens
            self._remember(work)
            if token is None:
                continue
            work.tokens.append(token)
            if work.generated >= work.max_tokens:
                self._end(work, whole=True)
                ended.append(work)
        return ended

    def load_finished(self, request_id: str, invalid: Collection[int]) -> None:
        """A pull ended; what lies in ``invalid`` blocks, and after them, is to be computed."""
        self._connector.loaded([request_id])
        work = self._works[request_id]
        if work.phase is Phase.ABORTED:
            del self._works[request_id]
            self.pool.let_go(work.blocks)
            return
        bad = next((number for number, block in enumerate(work.blocks) if block in invalid), len(work.blocks))
        # The last token is computed again all the same: the next one comes out of that.
        work.computed = min(work.computed, bad * self._block_size, len(work.tokens) - 1)
        work.cached_tokens = work.computed
        work.loaded, work.phase = True, Phase.WAITING
        self._remember(work)
        self._waiting.insert(0, work)

    def let_go(self, request_id: str) -> None:
        """Nobody reads the blocks of a request that has ended any more."""
        self.pool.let_go(self._kept.pop(request_id))

    def abort(self, request_id: str) -> None:
        """The request's client left."""
        work = self._works.get(request_id)
        if work is None or work.phase is Phase.ABORTED:
            return
        if work.phase is Phase.LOADING:
            # Its blocks are written until the pull has ended.
            work.phase = Phase.ABORTED
            self._connector.finished(request_id)
        else:
            self._end(work)

    def check_integrity(self) -> None:
        """Raises AssertionError where blocks and requests do not agree."""
        self.pool.check_integrity()
        kept = {block for blocks in self._kept.values() for block in blocks}
        held = kept | {block for work in self._works.values() for block in work.blocks}
        assert len(held) == len(self.pool._holders) - self.pool.free

    def _admit(self, step: Step, budget: int, now_ms: float) -> None:
        # Those whose prefix was pulled hold blocks already: nobody who needs some may stand before them.
        for work in sorted(self._waiting, key=lambda work: not work.loaded):
            if not budget or len(self._running) >= self._seqs_max:
                return
            cached: list[int] = []
            if not work.loaded:
                cached = self._cached(work)
                external = self._connector.matched(work.request_id, len(cached) * self._block_size, now_ms, self.pool.free)
                if external is None:
                    continue
                if external:
                    if not self._begin_load(work, cached, external):
                        return
                    continue
            tokens = self._begin(work, cached, budget)
            if not tokens:
                return
            step.parts.append(_part(work, tokens, work.blocks, restarted=True))
            budget -= tokens

    def _begin(self, work: Work, cached: list[int], budget: int) -> int:
        """Lets a request take part; how many tokens it begins with, 0 where there are too few blocks."""
        computed = work.computed if work.loaded else len(cached) * self._block_size
        tokens = min(len(work.tokens) - computed, budget)
        taken = self.pool.take(cached, self._blocks_for(computed + tokens) - len(cached) - len(work.blocks))
        if taken is None:
            return 0
        work.blocks += taken
        if not work.loaded:
            work.computed = work.cached_tokens = computed
            work.remembered = len(cached)
            self._connector.allocated(work.request_id, work.blocks, 0)
        self._waiting.remove(work)
        self._running.append(work)
        work.phase = Phase.RUNNING
        return tokens

    def _begin_load(self, work: Work, cached: list[int], external: int) -> bool:
        until = len(cached) * self._block_size + external
        taken = self.pool.take(cached, self._blocks_for(until) - len(cached))
        if taken is None:
            return False
        work.blocks, work.computed, work.remembered = taken, until, len(cached)
        work.phase = Phase.LOADING
        self._waiting.remove(work)
        self._connector.allocated(work.request_id, work.blocks, external)
        return True

    def _grown(self, work: Work, tokens: int, step: Step) -> list[int] | None:
        """The blocks that a running request needs beyond its own; None where it was itself preempted."""
        needed = self._blocks_for(work.computed + tokens) - len(work.blocks)
        while (taken := self.pool.take((), max(needed, 0))) is None:
            last = self._running[-1]
            self._preempt(last, step)
            if last is work:
                return None
        work.blocks += taken
        return taken

    def _works_on(self, step: Step) -> bool:
        return bool(step.parts or step.preempted or self._running or self.loading)

    def _break_up(self, step: Step) -> None:
        """Where those whose prefix was pulled hold the blocks that each of them still needs, the last one starts again."""
        holders = [work for work in self._waiting if work.blocks]
        if len(holders) > 1:
            self._waiting.remove(holders[-1])
            self._restart(holders[-1], step)

    def _preempt(self, work: Work, step: Step) -> None:
        self._running.remove(work)
        step.parts = [part for part in step.parts if part.work is not work]
        self._restart(work, step)

    def _restart(self, work: Work, step: Step) -> None:
        step.preempted.append(work.request_id)
        self.pool.let_go(work.blocks)
        work.blocks, work.computed, work.remembered = [], 0, 0
        work.loaded, work.phase = False, Phase.WAITING
        self._waiting.insert(0, work)

    def _end(self, work: Work, *, whole: bool = False) -> None:
        del self._works[work.request_id]
        (self._running if work.phase is Phase.RUNNING else self._waiting).remove(work)
        if self._connector.finished(work.request_id, whole=whole):
            self._kept[work.request_id] = work.blocks
        else:
            self.pool.let_go(work.blocks)

    def _cached(self, work: Work) -> list[int]:
        """The blocks of its prefix that are in HBM. Its last token is never taken from there: the next one comes out of its step."""
        self._name(work, len(work.tokens))
        return self.pool.known(work.names[: (len(work.tokens) - 1) // self._block_size])

    def _remember(self, work: Work) -> None:
        full = work.computed // self._block_size
        if full > work.remembered:
            self._name(work, full * self._block_size)
            for number in range(work.remembered, full):
                if self.pool.remember(work.blocks[number], work.names[number]):
                    before = work.names[number - 1] if number else None
                    tokens = work.tokens[number * self._block_size : (number + 1) * self._block_size]
                    self._events.stored(work.names[number], before, tokens, work.salt)
            work.remembered = full

    def _name(self, work: Work, tokens: int) -> None:
        if len(work.names) < tokens // self._block_size:
            extend_chunk_keys(work.names, root_key(b"", work.salt), work.tokens[:tokens], self._block_size)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)


def _part(work: Work, tokens: int, blocks: list[int], *, restarted: bool) -> Part:
    return Part(work, work.computed, tokens, Scheduled(work.request_id, list(blocks), restarted, work.computed, tokens))
