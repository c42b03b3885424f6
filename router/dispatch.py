"""Which way a prompt goes: straight to decode, or through prefill first, and who waits for whom."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cachebus.colleagues import Colleagues
from cachebus.keys import chunk_keys, root_key
from cachebus.messages import Report, Worker
from cachebus.watch import Watch
from router.callers import Terms
from router.costs import Learnt, Way
from router.fleet import Fleet
from router.flights import Flight, Flights
from router.follow import Computing, Followed, nearly_computed
from router.legs import LegBroken, LegFailed, Legs
from router.metrics import RouterMetrics
from router.policies import Ask, make_policy
from router.remembered import Guess
from router.reports import Reports, arrived
from router.retries import RetryBudget
from router.settings import RouterSettings
from router.timeline import WAIT, phase

log = logging.getLogger("headstart.router")

PREFILL_ATTEMPTS = 2
ROUNDS_MAX = 16
_SETTLE_SECONDS_MAX = 1.0
_ASK_AGAIN_SECONDS = 0.25
_SURE = 0.9
"""What a guessed number of tokens may be of a limit."""


class _ComputedElsewhere(Exception):
    """Another router has had it computed."""


@dataclass(frozen=True)
class Route:
    """How a request's prompt was prepared. ``ask`` is what it wants, ``prefill`` is the prefill leg's report, ``ways`` are those it had.

    ``flight`` is the request's own decode leg where others may be waiting for it; it ends with the first token. ``leg``: its prefill leg, and
    ``followed`` the same where that is still under way.
    """

    through_prefill: bool
    ask: Ask
    prefill: Report | None = None
    flight: Flight | None = None
    ways: Sequence[Way] = ()
    leg: Flight | None = None
    followed: Followed | None = None

    @property
    def name(self) -> str:
        """The value of x-headstart-route."""
        return "prefill+decode" if self.through_prefill else "decode"


class Dispatcher:
    """Decides and runs prefill legs."""

    def __init__(
        self,
        settings: RouterSettings,
        watch: Watch,
        colleagues: Colleagues,
        fleet: Fleet,
        legs: Legs,
        metrics: RouterMetrics,
        retries: RetryBudget,
    ) -> None:
        self._settings, self._watch, self._fleet, self._legs, self._metrics = settings, watch, fleet, legs, metrics
        self._colleagues, self._retries = colleagues, retries
        self.learnt = Learnt()
        self.policy = make_policy(settings, watch.replica, fleet, self.learnt)
        self.flights = Flights(watch.replica, lambda flight: colleagues.end(flight.claim))
        self.reports = Reports()

    def keys(self, worker: Worker, model: str, token_ids: Sequence[int], terms: Terms) -> list[bytes]:
        """The names of a prompt's chunks, as the worker's engine names them for that model or adapter."""
        return chunk_keys(root_key(worker.namespace, terms.salt, worker.adapters.get(model, "")), token_ids, worker.chunk_size)

    def straight(self, worker: Worker, model: str, guess: Guess) -> Route | None:
        """The way of a prompt that goes straight to decode by what is guessed of it; None where more should be known first.

        Too little may be missing for a prefill worker, and it may not come near ``router.prompt_tokens_max``; what is too long for the engine that
        one refuses itself.
        """
        if self._settings.prompt_tokens_max and guess.tokens > _SURE * self._settings.prompt_tokens_max:
            return None
        ask = Ask(model, guess.keys, guess.tokens, worker.chunk_size, worker.chunk_bytes)
        ways = self.policy.ways(ask, time.monotonic())
        if not ways or ways[0].prefill or ways[0].tokens >= self._settings.prefill_tokens_min:
            return None
        return Route(False, ask, ways=ways)

    async def prepare(self, worker: Worker, model: str, token_ids: Sequence[int], request_id: str, terms: Terms) -> Route:
        """Returns when the decode leg may start. ``worker`` is any that serves the model, or adapter: all share its namespace.

        A prompt that somebody is computing waits for that, where the policy thinks that this is the sooner. Any other goes through a prefill
        worker, or to decode at once, as the policy has it; always to decode where there is no prefill worker.
        """
        replica = self._watch.replica
        plain = Ask(model)
        if len(token_ids) >= worker.max_model_len:
            # No prefill helps a prompt that the engine will refuse in its own words.
            return Route(False, plain)
        keys = self.keys(worker, model, token_ids, terms)
        ask = Ask(model, keys, len(token_ids), worker.chunk_size, worker.chunk_bytes)
        if not terms.store:
            # Nobody can pull what is not stored: neither its own decode worker, nor who would wait for it.
            return Route(False, ask)
        deadline = time.monotonic() + self._settings.single_flight_seconds_max
        for _ in range(ROUNDS_MAX):
            known, now = replica.known_prefix(keys), time.monotonic()
            ways = self.policy.ways(ask, now)
            if not ways:
                return Route(False, ask)
            under_way = self.flights.covering(keys, known)
            if under_way is None or now >= deadline or not self.policy.waits(ask, ways[0], under_way[0].until, known + under_way[1], now):
                break
            flight, count = under_way
            with phase(WAIT):
                await self.flights.wait(flight, keys, known + count, deadline - now)
            log.debug("request %s: waited %.3f s for %d chunks that another has computed", request_id, time.monotonic() - now, count)
            if flight.ended and not flight.computed:
                # Its leader, if it is still there, was woken together with us: it goes on with its own decode worker, and we follow.
                await asyncio.sleep(0)
            elif flight.computed:
                await self.flights.settled(keys[: known + count], _SETTLE_SECONDS_MAX)
                if replica.known_prefix(keys) <= known:
                    # Nothing of it was kept: to wait for the next in line would only make a queue of all.
                    return Route(False, ask, ways=ways)
        return await self._lead(ask, ways, token_ids, known, request_id, terms, deadline)

    async def _lead(self, ask: Ask, ways: list[Way], token_ids: Sequence[int], known: int, request_id: str, terms: Terms, deadline: float) -> Route:
        """Takes the first of ``ways``, of whose chunks the first ``known`` are stored, unless another router is at it."""
        wanted, until, claim = ask.keys[known:], time.monotonic() + ways[0].own, self._colleagues.new_number()
        through_prefill = bool(ways[0].prefill)
        # What is computed on the way to the first token is soon there for all.
        if not through_prefill and ways[0].tokens < max(ask.chunk_tokens, self._settings.prefill_tokens_min):
            return Route(False, ask, ways=ways)

        async def compute() -> Report | None:
            if await self._others_do(ask, ways[0], known, claim, deadline):
                raise _ComputedElsewhere
            return await self._prefill(ask, token_ids, known, request_id, terms, computing)

        computing = Computing()
        flight = self.flights.start(wanted, compute() if through_prefill else None, until, claim)
        if flight.task is None:
            try:
                theirs = await self._others_do(ask, ways[0], known, claim, deadline)
            except BaseException:
                self.flights.end(flight, computed=False)
                raise
            if theirs:
                self.flights.end(flight, computed=True)
            return Route(False, ask, flight=None if theirs else flight, ways=ways)
        followed = None
        try:
            if await self._may_follow(flight.task, ask, ways[0], computing, request_id):
                followed = Followed(flight, computing)
                self._metrics.followed.inc()
                return Route(True, replace(ask, coming=len(ask.keys)), ways=ways, leg=flight, followed=followed)
            return Route(True, ask, prefill=flight.task.result(), leg=flight, ways=ways)
        except _ComputedElsewhere:
            return Route(False, ask, ways=ways)
        except LegFailed as error:
            log.warning("request %s: %s; its decode worker computes the prompt", request_id, error)
            return Route(False, ask, flight=self.flights.start(wanted, None, until, claim), ways=ways)
        finally:
            if followed is None:
                flight.leave()

    async def _may_follow(self, leg: asyncio.Task[Report | None], ask: Ask, way: Way, computing: Computing, request_id: str) -> bool:
        """Waits for the prefill leg's end, or, where the policy can tell, for the moment in which the decode leg may follow it: then True."""
        if not self.policy.tells_when:
            await asyncio.wait([leg])
            return False

        def begins(chunks: int, worker: Worker) -> float | None:
            return self.policy.follows_in(ask, way, worker, chunks)

        near = asyncio.create_task(nearly_computed(self.flights, computing, lambda: self._watch.replica.known_prefix(ask.keys), begins))
        # Asking for the exception marks it as seen, also where the leg is over first or the client leaves.
        near.add_done_callback(lambda task: _told(task, request_id))
        try:
            await asyncio.wait([leg, near], return_when=asyncio.FIRST_COMPLETED)
            if near.done() and near.exception() is not None:
                await asyncio.wait([leg])
            return not leg.done()
        finally:
            near.cancel()

    async def _others_do(self, ask: Ask, way: Way, known: int, claim: int, deadline: float) -> bool:
        """Claims what comes after the first ``known`` chunks; True where another router had it computed meanwhile.

        While another has the claim, and waiting for it is the sooner, it is asked for again and again: routers may die without a word.
        """
        while True:
            claimed = await self._colleagues.claim(claim, ask.keys[known:], way.own, ask.keys[0])
            now, theirs = time.monotonic(), known + claimed.chunks
            if claimed.granted or now >= deadline or not self.policy.waits(ask, way, now + claimed.seconds, theirs, now):
                return False
            with phase(WAIT, "another router"):
                await self.flights.settled(ask.keys[:theirs], _ASK_AGAIN_SECONDS)
            if self._watch.replica.known_prefix(ask.keys) >= theirs:
                return True

    async def _prefill(self, ask: Ask, token_ids: Sequence[int], known: int, request_id: str, terms: Terms, computing: Computing) -> Report | None:
        """Has the prompt of ``ask`` computed, of which the first ``known`` chunks are stored."""
        tried: set[str] = set()
        for attempt in range(PREFILL_ATTEMPTS):
            begun = time.monotonic()
            if attempt and not self._retries.take(begun):
                break
            chosen = self.policy.worker("prefill", ask, tried, begun)
            if chosen is None:
                break
            worker = chosen.worker
            tried.add(worker.worker)
            transfer_id = secrets.token_hex(8)
            report = self.reports.expect(transfer_id)
            computing.worker, computing.report = worker, report
            idle = not self._fleet.in_flight[worker.worker]
            leg = self._fleet.begin(worker, chosen.way.compute, begun)
            outcome = "aborted"
            try:
                await self._legs.prefill(worker, ask.model, token_ids, transfer_id, request_id, terms)
                outcome = "done"
                took = time.monotonic() - begun
                log.debug("request %s: prefill on %s took %.3f s, thought %.3f s", request_id, worker.worker, took, chosen.way.own)
                if idle:
                    self.policy.leg_took(chosen.way, took)
                await self.flights.settled(ask.keys[known:], _SETTLE_SECONDS_MAX)
                return await arrived(report, self._settings.report_ms_max)
            except (LegFailed, *LegBroken) as error:
                outcome = "failed"
                log.warning("request %s: prefill on %s failed: %s", request_id, worker.worker, str(error) or type(error).__name__)
            finally:
                self._metrics.prefills.labels(outcome).inc()
                self._fleet.end(leg, time.monotonic())
                self.reports.forget(transfer_id)
        raise LegFailed(f"no prefill worker could compute the prompt ({len(tried)} tried)")


def _told(near: asyncio.Task[None], request_id: str) -> None:
    """A fault in looking when to follow costs the time that following saves, and no answer: the log says it."""
    if not near.cancelled() and (error := near.exception()) is not None:
        log.error("request %s: its decode leg waits for the prefill leg's end", request_id, exc_info=error)
