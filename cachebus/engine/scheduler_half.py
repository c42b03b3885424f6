"""The connector's scheduler half: which prefix to pull for a request, which blocks to publish. A plain state machine.

It runs on the engine core's one thread: lookups are sent when a request arrives and their answers are read when vLLM
asks. The first time it asks, an answer that is about to come is waited for, since vLLM's next question is a whole step
later. ``Bus`` is its port to the daemon; ``now_ms`` is any monotonic clock. It knows nothing of vLLM's classes, and of a
request only ``RequestView``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from cachebus.engine.break_even import BreakEven, Piece, PullTook, StepTook, of_prompts
from cachebus.engine.holds import Holds
from cachebus.engine.passing import Passing
from cachebus.engine.transfer import SAVING_STEPS_MAX, Coming, Follow, Load, LoadPiece, Save, StepPlan
from cachebus.engine.views import Bus, Policy, RequestView, Scheduled
from cachebus.keys import extend_chunk_keys, rank_key, root_key, tail_keys, tenant_id
from cachebus.messages import Acquire, Extent, Granted, Release, Report, Withdraw
from cachebus.wire import Tier

_NOT_ASKED_FOR = -1.0
"""Deadline of a lookup whose answer vLLM has not asked for yet."""

_REPLY_GRACE_MS = 50
"""What a lookup may take beyond the wait that the daemon was asked for."""

_FIRST_WAIT_MS = 2
"""How long the first question for a request waits for a lookup's answer; it takes a third of a millisecond where a core is free."""

_IMPATIENT_MS = 100
"""After an answer that did not come in that time nobody waits so long: many requests must not wait one after the other."""


class _Phase(Enum):
    IDLE = "nothing asked yet"
    ASKED = "lookup under way"
    GRANTED = "lease held, load not begun"
    SETTLED = "pulled, or decided not to"


@dataclass
class _Tracked:
    view: RequestView
    root: bytes
    tenant: bytes
    keys: list[bytes] = field(default_factory=list)
    tails: list[bytes] = field(default_factory=list)
    phase: _Phase = _Phase.IDLE
    tickets: dict[int, int] = field(default_factory=dict)
    """The rank that each lookup under way is for."""
    deadline_ms: float = _NOT_ASKED_FOR
    leases: dict[int, int] = field(default_factory=dict)
    """By rank."""
    extents: list[list[Extent]] = field(default_factory=list)
    """By rank, as many of each as all have."""
    blocks: list[int] = field(default_factory=list)
    local_tokens: int = 0
    pulled_to: int = 0
    published: int = 0
    tail_published: bool = False
    saved: list[bytes] = field(default_factory=list)
    reported: bool = False
    follow_ms: int = 0
    """How long each part is waited for of what another engine is computing; 0 once that was tried."""


class SchedulerHalf:
    """See the module. One a engine."""

    def __init__(self, policy: Policy, bus: Bus) -> None:
        self._policy = policy
        self._bus = bus
        self._requests: dict[str, _Tracked] = {}
        self._tickets: dict[int, str] = {}
        self._loads: list[Load] = []
        # The blocks that the last steps save, of chunks and of tails, by the step's number; the worker may still be copying them.
        self._saving: dict[int, set[int]] = {}
        self._saving_tails: dict[int, set[int]] = {}
        self._saving_steps = 0
        self._patient_from_ms = 0.0
        self.holds = Holds(policy, bus)
        self._break_even = BreakEven()
        self._passing = Passing()
        self._learnt_at_seconds = 0.0
        self.declined_chunks = 0

    def add(self, view: RequestView) -> None:
        """A request arrived: look its prompt up."""
        tracked = _Tracked(view, root_key(self._policy.namespace, view.salt, view.adapter), tenant_id(view.salt))
        tracked.follow_ms = view.transfer.follow_ms if view.transfer is not None else 0
        self._requests[view.request_id] = tracked
        prompt = view.tokens[: view.prompt_tokens]
        extend_chunk_keys(tracked.keys, tracked.root, prompt, self._policy.chunk_size)
        end = len(tracked.keys) * self._policy.chunk_size
        tracked.tails = tail_keys(tracked.keys[-1] if tracked.keys else tracked.root, prompt[end:], self._policy.block_size)
        self._ask(tracked)

    def matched(self, request_id: str, local_tokens: int, now_ms: float, free_blocks: int) -> int | None:
        """How many tokens after the ``local_tokens`` first ones can be pulled; None: ask again in the next step, others may go first.

        ``free_blocks``: what the engine could give the request.
        """
        self._read_replies()
        tracked = self._requests.get(request_id)
        if tracked is None:
            return 0
        tracked.local_tokens = local_tokens
        if tracked.phase is _Phase.IDLE:
            self._ask(tracked)
        if tracked.phase is _Phase.ASKED and tracked.deadline_ms == _NOT_ASKED_FOR:
            tracked.deadline_ms = now_ms + self._policy.lookup_ms_max + _REPLY_GRACE_MS
            patient = now_ms >= self._patient_from_ms
            while patient and tracked.phase is _Phase.ASKED:
                patient = self._read_replies(_FIRST_WAIT_MS)
                if not patient:
                    self._patient_from_ms = now_ms + _IMPATIENT_MS
        if tracked.phase is _Phase.ASKED:
            if now_ms < tracked.deadline_ms:
                return None
            self._forget_tickets(tracked)
            tracked.phase = _Phase.SETTLED
        there = self._tokens_in(tracked, len(tracked.extents[0])) - local_tokens if tracked.extents else 0
        may_pull = tracked.phase is _Phase.GRANTED and (there >= self._policy.pull_tokens_min or bool(tracked.follow_ms))
        if may_pull and self._passing.is_coming(request_id, tracked.keys, local_tokens // self._policy.chunk_size):
            return None
        blocks = -(-len(tracked.view.tokens) // self._policy.block_size) - local_tokens // self._policy.block_size
        if self._passing.lets_pass(request_id, blocks, free_blocks, pulls=may_pull):
            return None
        return self._to_pull(tracked, now_ms) if may_pull else 0

    def loaded(self, request_ids: Iterable[str]) -> None:
        """These requests' loads ended, however they did."""
        for request_id in request_ids:
            self._passing.pulled(request_id)

    def took(self, samples: Iterable[StepTook | PullTook], now_ms: float) -> None:
        """What steps and pulls took in the workers."""
        self._learnt_at_seconds = now_ms / 1000
        for sample in samples:
            self._break_even.add(sample, self._learnt_at_seconds)

    def allocated(self, request_id: str, blocks: Sequence[int], external_tokens: int) -> None:
        """vLLM gave the request its blocks: begin the load, or let go of what was leased."""
        tracked = self._requests.get(request_id)
        if tracked is None or tracked.phase is not _Phase.GRANTED:
            return
        tracked.phase = _Phase.SETTLED
        pulled_to = tracked.local_tokens + external_tokens
        self.declined_chunks += sum(self._tokens_in(tracked, number + 1) > pulled_to for number in range(len(tracked.extents[0])))
        if not external_tokens:
            self._let_go(tracked)
            return
        first = tracked.local_tokens // self._policy.block_size
        last = -(-pulled_to // self._policy.block_size)
        for rank in range(len(self._policy.holders)):
            pieces, follows = self._pieces(tracked, rank, blocks, first, last), self._follow(tracked, rank, blocks, first)
            self._loads.append(Load(request_id, tracked.leases.get(rank, 0), pieces, rank, follows))
        if tracked.follow_ms:
            # Whoever computes it publishes it.
            tracked.published, tracked.tail_published, tracked.follow_ms = len(tracked.keys), True, 0
        tracked.pulled_to = pulled_to
        tracked.leases = {}
        self._passing.begun(request_id, tracked.keys[: pulled_to // self._policy.chunk_size])

    def step(self, scheduled: Iterable[Scheduled], preempted: Iterable[str]) -> StepPlan:
        """The loads that begin in this step and the chunks that it completes."""
        parts = list(scheduled)
        self._read_replies()
        self._passing.stepped(part.request_id for part in parts)
        for request_id in preempted:
            tracked = self._requests.get(request_id)
            if tracked is not None:
                self._abandon_lookup(tracked)
                tracked.phase, tracked.saved = _Phase.IDLE, []
        saves: list[Save] = []
        written: set[int] = set()
        for part in parts:
            tracked = self._requests.get(part.request_id)
            if tracked is None:
                # Blocks that it had before are its own; only new ones may be anybody's saves.
                written.update(part.blocks)
                continue
            saves += self._advance(tracked, part)
            first = part.computed // self._policy.block_size
            last = -(-(part.computed + part.scheduled) // self._policy.block_size)
            written.update(tracked.blocks[first:last])
        loads, self._loads = self._loads, []
        written.update(block for load in loads for piece in load.pieces for block in piece.blocks)
        fence, tail_fence = _last_touched(self._saving, written), _last_touched(self._saving_tails, written)
        return StepPlan(
            loads, saves, self._remember(saves), fence, tail_fence, not parts, *of_prompts([(part.computed, part.scheduled) for part in parts])
        )

    def finished(self, request_id: str, *, whole: bool = False) -> bool:
        """The request ended, however it did; ``whole``: it was not aborted. A load that has begun goes on and ends its lease itself.

        True where the engine is to keep its blocks until ``holds.over`` names it: it was computed for somebody else, who may still read them.
        """
        self._passing.gone(request_id)
        tracked = self._requests.pop(request_id, None)
        if tracked is None:
            return False
        self._abandon_lookup(tracked)
        read = whole and tracked.saved and not tracked.pulled_to and len(tracked.view.tokens) <= tracked.view.prompt_tokens + 1
        return bool(read) and self.holds.begin(request_id, tracked.saved, len(tracked.blocks))

    def _remember(self, saves: Sequence[Save]) -> int:
        """Keeps in mind what may be under way after this step; the step's number among those that save."""
        if not saves:
            return 0
        self._saving_steps += 1
        for saving, tail in ((self._saving, False), (self._saving_tails, True)):
            saving[self._saving_steps] = {block for save in saves if save.tail is tail for block in save.blocks}
            saving.pop(self._saving_steps - SAVING_STEPS_MAX, None)
        return self._saving_steps

    def _ask(self, tracked: _Tracked) -> None:
        policy = self._policy
        if len(tracked.keys) > tracked.view.prompt_tokens // policy.chunk_size:
            # A preempted request that has generated past its prompt's tail: a chunk holds it now.
            tracked.tails = []
        keys = tracked.keys + tracked.tails
        if not keys or not tracked.view.may_pull:
            tracked.phase = _Phase.SETTLED
            return
        tracked.extents = [[] for _ in policy.holders]
        if tracked.follow_ms and policy.hold_ms:
            # The load asks for all of it: what another engine still has in its blocks need not come from the region.
            tracked.phase = _Phase.GRANTED
            return
        for rank, holder in enumerate(policy.holders):
            parts = [rank_key(key, rank) for key in keys]
            # What is being computed is waited for by the load.
            ticket = self._bus.submit(Acquire(holder, policy.layout, parts, 0 if tracked.follow_ms else policy.lookup_ms_max))
            tracked.tickets[ticket] = rank
            self._tickets[ticket] = tracked.view.request_id
        tracked.deadline_ms = _NOT_ASKED_FOR
        tracked.phase = _Phase.ASKED

    def _read_replies(self, wait_ms: float = 0) -> bool:
        """Whether any had come, or came within ``wait_ms``."""
        replies = self._bus.poll(wait_ms)
        for ticket, reply in replies:
            if self.holds.answered(ticket):
                continue
            request_id = self._tickets.pop(ticket, None)
            if not isinstance(reply, Granted):
                continue
            tracked = self._requests.get(request_id) if request_id is not None else None
            if tracked is None or ticket not in tracked.tickets or tracked.phase is not _Phase.ASKED:
                # Too late, or its request is gone.
                if reply.lease:
                    self._bus.submit(Release([reply.lease]))
                continue
            rank = tracked.tickets.pop(ticket)
            tracked.extents[rank] = reply.extents
            if reply.lease:
                tracked.leases[rank] = reply.lease
            if not tracked.tickets:
                self._answered(tracked)
        return bool(replies)

    def _answered(self, tracked: _Tracked) -> None:
        """All ranks' lookups are answered: what all have is there, and no more is leased if that is nothing."""
        there = min(map(len, tracked.extents))
        tracked.extents = [extents[:there] for extents in tracked.extents]
        tracked.phase = _Phase.GRANTED if there or tracked.follow_ms else _Phase.SETTLED
        if not there:
            self._let_go(tracked)
        tracked.published = min(there, len(tracked.keys))
        tracked.tail_published = there == len(tracked.keys) + len(tracked.tails)

    def _tokens_in(self, tracked: _Tracked, extents: int) -> int:
        """Tokens that the first ``extents`` of the request's keys hold; the last block of a prompt's tail may be partly filled."""
        chunks = min(extents, len(tracked.keys))
        if extents == chunks:
            return chunks * self._policy.chunk_size
        return min(chunks * self._policy.chunk_size + (extents - chunks) * self._policy.block_size, tracked.view.prompt_tokens)

    def _to_pull(self, tracked: _Tracked, now_ms: float) -> int:
        """Tokens after the local ones that are pulled if the request gets its blocks now."""
        count = len(tracked.keys) + len(tracked.tails) if tracked.follow_ms else self._worth(tracked, now_ms)
        found = self._tokens_in(tracked, count) - tracked.local_tokens
        return found if found >= self._policy.pull_tokens_min else 0

    def _worth(self, tracked: _Tracked, now_ms: float) -> int:
        """How many of what was granted are sooner pulled than computed."""
        local, pieces = 0, []
        for number, extent in enumerate(tracked.extents[0]):
            tokens = self._tokens_in(tracked, number + 1)
            if tokens <= tracked.local_tokens:
                local += 1
            else:
                pieces.append(Piece("dram" if extent.ready else extent.source, extent.length, tokens))
        return local + self._break_even.worth(pieces, tracked.local_tokens, tracked.view.prompt_tokens, now_ms / 1000)

    def _pieces(self, tracked: _Tracked, rank: int, blocks: Sequence[int], first: int, last: int) -> list[LoadPiece]:
        """The rank's extents that cover the request's blocks ``first`` to ``last``, last excluded."""
        pieces = []
        for number, extent in enumerate(tracked.extents[rank]):
            start, end = self._span(tracked, number)
            if end > first and start < last:
                targets = [blocks[i] if first <= i < last else -1 for i in range(start, end)]
                place = (extent.slot, extent.generation, extent.ready, extent.source)
                pieces.append(LoadPiece(extent.key, extent.offset, extent.length, extent.digest, targets, *place))
        return pieces

    def _span(self, tracked: _Tracked, number: int) -> tuple[int, int]:
        """The request's blocks that its key of that number is for, the last excluded."""
        return self._tokens_in(tracked, number) // self._policy.block_size, -(-self._tokens_in(tracked, number + 1) // self._policy.block_size)

    def _follow(self, tracked: _Tracked, rank: int, blocks: Sequence[int], first: int) -> Follow | None:
        """What is not there yet of a prompt that another engine is computing, from the request's block ``first`` on."""
        if not tracked.follow_ms:
            return None
        keys, coming = [*tracked.keys, *tracked.tails], []
        for number in range(len(tracked.extents[rank]), len(keys)):
            start, end = self._span(tracked, number)
            if end > first:
                coming.append(Coming(rank_key(keys[number], rank), [blocks[i] if i >= first else -1 for i in range(start, end)]))
        return Follow(self._policy.holders[rank], self._policy.layout, tracked.follow_ms, coming)

    def _advance(self, tracked: _Tracked, part: Scheduled) -> list[Save]:
        policy, view = self._policy, tracked.view
        tracked.blocks = list(part.blocks) if part.restarted else tracked.blocks + part.blocks
        self._let_go(tracked)
        if part.computed < min(tracked.pulled_to, len(view.tokens) - 1):
            # A piece was bad, and what follows it is computed again: the store wants it again too.
            tracked.published = min(tracked.published, part.computed // policy.chunk_size)
            tracked.tail_published = False
        if not tracked.reported:
            tracked.reported = True
            self._report(tracked, part.computed)
        tracked.pulled_to = 0
        if view.transfer is not None and not view.transfer.store:
            return []
        after = part.computed + part.scheduled
        if after >= view.prompt_tokens and part.scheduled >= policy.chunk_size:
            self._passing.open()
        # Tokens that the engine has scheduled but not sampled yet have no id, hence no key; their chunk waits a step.
        known = min(after, len(view.tokens)) if policy.save_decode_cache else min(after, view.prompt_tokens)
        saves = []
        ttl = view.transfer.ttl_seconds if view.transfer is not None else 0
        blocks_in_chunk = policy.chunk_size // policy.block_size
        if known >= (tracked.published + 1) * policy.chunk_size:
            extend_chunk_keys(tracked.keys, tracked.root, view.tokens[:known], policy.chunk_size)
        for number in range(tracked.published, known // policy.chunk_size):
            blocks = tracked.blocks[number * blocks_in_chunk : (number + 1) * blocks_in_chunk]
            saves.append(Save(tracked.keys[number], blocks, False, tracked.tenant, ttl))
            tracked.published = number + 1
        if not tracked.tail_published and after >= view.prompt_tokens:
            tracked.tail_published = True
            first = view.prompt_tokens // policy.chunk_size * blocks_in_chunk
            saves += [Save(key, [tracked.blocks[first + i]], True, tracked.tenant, ttl) for i, key in enumerate(tracked.tails)]
        tracked.saved += [save.key for save in saves]
        return saves

    def _report(self, tracked: _Tracked, computed: int) -> None:
        transfer = tracked.view.transfer
        if transfer is None:
            return
        pulled = self._pulled(tracked, computed) if tracked.pulled_to else {}
        hbm_tokens = computed - sum(pulled.values())
        rates = (*self._break_even.rates(self._learnt_at_seconds), self._break_even.longest_tokens)
        self._bus.submit(Report(transfer.transfer_id, transfer.leg, self._policy.worker, tracked.view.prompt_tokens, hbm_tokens, pulled, *rates))

    def _pulled(self, tracked: _Tracked, computed: int) -> dict[Tier, int]:
        """Tokens of the first ``computed`` ones that were pulled, by the tier that the first rank's part came from."""
        found: dict[Tier, int] = {}
        for number, extent in enumerate(tracked.extents[0]):
            tokens = min(self._tokens_in(tracked, number + 1), computed) - max(self._tokens_in(tracked, number), tracked.local_tokens)
            if tokens > 0:
                found[extent.source] = found.get(extent.source, 0) + tokens
        # What came while another engine computed it.
        followed = computed - max(self._tokens_in(tracked, len(tracked.extents[0])), tracked.local_tokens)
        return {**found, "dram": found.get("dram", 0) + followed} if followed > 0 else found

    def _let_go(self, tracked: _Tracked) -> None:
        if tracked.leases:
            self._bus.submit(Release(list(tracked.leases.values())))
            tracked.leases = {}

    def _forget_tickets(self, tracked: _Tracked) -> None:
        for ticket in tracked.tickets:
            if self._tickets.pop(ticket, None) is not None:
                self._bus.submit(Withdraw(ticket))
        tracked.tickets = {}

    def _abandon_lookup(self, tracked: _Tracked) -> None:
        self._forget_tickets(tracked)
        self._let_go(tracked)


def _last_touched(saving: Mapping[int, set[int]], written: set[int]) -> int:
    """The number of the last step that saves any of the blocks ``written``; 0 where none does."""
    return max((number for number, blocks in saving.items() if not written.isdisjoint(blocks)), default=0)
