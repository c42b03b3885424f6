"""Who takes a leg: by what each way costs, or by one of the simpler rules that people compare with. Pure but for what it looks at."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cachebus.messages import Worker
from cachebus.replica import Replica
from cachebus.wire import Role
from router.costs import NEAREST_FIRST, Learnt, Load, Pool, Prompt, Way, after_prefill, decode_alone, prefill_leg
from router.fleet import Fleet, candidates
from router.follow import begins_in
from router.settings import RouterSettings

BUSIER_MAX: dict[Role, int] = {"prefill": 0, "decode": 4}
"""How many requests more than the least busy worker one may have to be preferred for what its HBM holds.

A decode worker shares its steps among all that it has, so some more cost little; at a prefill worker each waits for those before it.
"""
_ALIKE_SECONDS = 1e-4
"""Ways whose costs differ by less take turns."""

_LEG_SECONDS_ASSUMED = 0.005
_LEG_KEPT = 0.9


@dataclass(frozen=True)
class Ask:
    """What a request wants: ``tokens`` of prompt whose chunks are ``keys``; no keys where its prompt was not rendered.

    ``coming``: so many of the first ones will be in DRAM when they are needed.
    """

    model: str
    keys: Sequence[bytes] = ()
    tokens: int = 1
    chunk_tokens: int = 1
    chunk_bytes: int = 0
    coming: int = 0


@dataclass(frozen=True)
class Chosen:
    """A worker for a leg, and what the leg is thought to take there, nothing where the policy does not know."""

    worker: Worker
    way: Way


class Policy(Protocol):
    """Decides, by what is known when it is asked."""

    def ways(self, ask: Ask, now: float) -> list[Way]:
        """The ways that there are, the one to take first; none where no decode worker serves the model."""

    def waits(self, ask: Ask, way: Way, until: float, chunks: int, now: float) -> bool:
        """Whether to wait for a flight that ends at ``until`` and leaves the first ``chunks`` stored, rather than to take ``way``."""

    def worker(self, role: Role, ask: Ask, without: Collection[str], now: float) -> Chosen | None:
        """Who takes the leg of that role now, none of ``without``; None where there is none."""

    def leg_took(self, way: Way, seconds: float) -> None:
        """A prefill leg to a worker that was idle took so long; ``way``: as it was chosen."""

    def hand_over_took(self, ask: Ask, decode: Worker, seconds: float) -> None:
        """The first token came from a decode worker, where no prompt was before it, so long after a prefill worker had computed the prompt."""

    @property
    def tells_when(self) -> bool:
        """Whether ``follows_in`` may ever tell; where not, decode legs begin after their prefill legs and nobody need look for the moment."""

    def follows_in(self, ask: Ask, way: Way, prefill: Worker, chunks: int) -> float | None:
        """How long after the first ``chunks`` were published the way's decode leg may begin; None where that is not known."""


class Turns:
    """When each worker was chosen last: equals take turns."""

    def __init__(self) -> None:
        self._chosen_at: dict[str, int] = {}
        self._choices = 0

    def place(self, worker: Worker) -> tuple[int, str]:
        """Sorts those that were chosen longest ago first."""
        return self._chosen_at.get(worker.worker, -1), worker.worker

    def took(self, worker: Worker) -> Worker:
        """It was chosen now."""
        self._choices += 1
        self._chosen_at[worker.worker] = self._choices
        return worker


class ByRule:
    """``round_robin``, ``least_loaded`` and ``prefix_affinity``; what lacks ``router.prefill_tokens_min`` tokens goes through prefill."""

    tells_when = False

    def __init__(self, settings: RouterSettings, replica: Replica, fleet: Fleet) -> None:
        self._settings, self._replica, self._fleet = settings, replica, fleet
        self._turns = Turns()

    def ways(self, ask: Ask, now: float) -> list[Way]:
        workers = self._fleet.health.usable(self._replica.workers.values(), now)
        chunks = self._hbm_chunks(ask.keys)
        able = candidates(workers, "decode", ask.model)
        in_hbm = max((chunks.get(w.worker, 0) for w in self._equals("decode", able, chunks)), default=0)
        known = max(self._replica.known_prefix(ask.keys), in_hbm)
        missing = ask.tokens - known * ask.chunk_tokens
        through_prefill = missing >= self._settings.prefill_tokens_min and candidates(workers, "prefill", ask.model)
        return [Way(prefill="any" if through_prefill else "", decode="any", tokens=missing)] if able else []

    def waits(self, ask: Ask, way: Way, until: float, chunks: int, now: float) -> bool:
        known = self._replica.known_prefix(ask.keys)
        missing = ask.tokens - known * ask.chunk_tokens
        # Waiting for a small part of what is missing would only delay the rest.
        return way.tokens >= self._settings.prefill_tokens_min and 2 * (chunks - known) * ask.chunk_tokens >= missing

    def worker(self, role: Role, ask: Ask, without: Collection[str], now: float) -> Chosen | None:
        able = candidates(self._fleet.health.usable(self._replica.workers.values(), now), role, ask.model, without)
        if not able:
            return None
        equals = self._equals(role, able, self._hbm_chunks(ask.keys))
        counts = self._settings.policy != "round_robin"
        taken = self._turns.took(min(equals, key=lambda w: (self._fleet.requests(w.worker) if counts else 0, *self._turns.place(w))))
        return Chosen(taken, Way())

    def leg_took(self, way: Way, seconds: float) -> None:
        pass

    def hand_over_took(self, ask: Ask, decode: Worker, seconds: float) -> None:
        pass

    def follows_in(self, ask: Ask, way: Way, prefill: Worker, chunks: int) -> float | None:
        return None

    def _hbm_chunks(self, keys: Sequence[bytes]) -> Mapping[str, int]:
        return self._replica.hbm_prefixes(keys) if self._settings.policy == "prefix_affinity" else {}

    def _equals(self, role: Role, able: Sequence[Worker], chunks: Mapping[str, int]) -> Sequence[Worker]:
        if self._settings.policy != "prefix_affinity":
            return able
        return warmest(role, able, {w.worker: self._fleet.requests(w.worker) for w in able}, chunks)


def warmest(role: Role, able: Sequence[Worker], in_flight: Mapping[str, int], hbm_chunks: Mapping[str, int]) -> list[Worker]:
    """Those of ``able`` with most of a prompt's chunks in HBM, among those that are not much busier than the least busy."""
    if not able:
        return []
    busiest = min(in_flight.get(w.worker, 0) for w in able) + BUSIER_MAX[role]
    near = [w for w in able if in_flight.get(w.worker, 0) <= busiest]
    most = max(hbm_chunks.get(w.worker, 0) for w in near)
    return [w for w in near if hbm_chunks.get(w.worker, 0) == most]


class ByCost:
    """The way that costs least (``router.costs``)."""

    tells_when = True

    def __init__(self, settings: RouterSettings, replica: Replica, fleet: Fleet, learnt: Learnt) -> None:
        self._settings, self._replica, self._fleet, self._learnt = settings, replica, fleet, learnt
        self._turns = Turns()
        self._leg_seconds = self._hand_over_seconds = _LEG_SECONDS_ASSUMED
        self._last: tuple[Ask, int, Prompt] | None = None

    def ways(self, ask: Ask, now: float) -> list[Way]:
        return self._ways(ask, self._prompt(ask), now)

    def waits(self, ask: Ask, way: Way, until: float, chunks: int, now: float) -> bool:
        if way.tokens < ask.chunk_tokens:
            return False
        then = self._ways(ask, self._prompt(ask).as_if_stored(chunks), now)
        if not then:
            return False
        # What is computed a second time is taken from somebody else, also where a worker is idle now.
        twice = max(0.0, way.compute - then[0].compute)
        return max(0.0, until - now) + then[0].total <= way.total + twice

    def worker(self, role: Role, ask: Ask, without: Collection[str], now: float) -> Chosen | None:
        prompt = self._prompt(ask)
        able = self._with_room(role, candidates(self._fleet.health.usable(self._replica.workers.values(), now), role, ask.model, without))
        legs = (self._prefills if role == "prefill" else self._decodes)(prompt, able, *self._pool(role, able, now))
        if not legs:
            return None
        cheapest = min(way.total for way in legs)
        equals = {way.prefill or way.decode: way for way in legs if way.total - cheapest < _ALIKE_SECONDS}
        taken = self._turns.took(min((w for w in able if w.worker in equals), key=self._turns.place))
        return Chosen(taken, equals[taken.worker])

    def leg_took(self, way: Way, seconds: float) -> None:
        if not way.prefill:
            return
        self._leg_seconds = _averaged(self._leg_seconds, seconds - way.pull - way.compute)

    def hand_over_took(self, ask: Ask, decode: Worker, seconds: float) -> None:
        prompt = Prompt(ask.tokens, ask.chunk_tokens, ask.chunk_bytes, ()).as_if_stored(ask.tokens // ask.chunk_tokens)
        pull, compute, _ = prompt.made_ready(decode.worker, self._learnt.rates(decode))
        self._hand_over_seconds = _averaged(self._hand_over_seconds, seconds - pull - compute)

    def follows_in(self, ask: Ask, way: Way, prefill: Worker, chunks: int) -> float | None:
        decode = self._replica.workers.get(way.decode)
        if decode is None:
            return None
        rest = self._learnt.rates(prefill).compute(min(chunks * ask.chunk_tokens, ask.tokens), ask.tokens)
        return begins_in(rest, self._learnt.rates(decode).pull(["dram"] * chunks, ask.chunk_bytes))

    def _prompt(self, ask: Ask) -> Prompt:
        """Where the prompt's chunks are: looked up once where a worker is chosen right after the way and nothing was heard in between."""
        if self._last is not None and self._last[0] is ask and self._last[1] == self._replica.version:
            return self._last[2]
        prompt = self._looked_up(ask)
        self._last = ask, self._replica.version, prompt
        return prompt

    def _looked_up(self, ask: Ask) -> Prompt:
        tiers = self._replica.nearest_tiers(ask.keys, NEAREST_FIRST)
        found = Prompt(ask.tokens, ask.chunk_tokens, ask.chunk_bytes, tiers, self._replica.hbm_prefixes(ask.keys))
        return found.as_if_stored(ask.coming) if ask.coming else found

    def _ways(self, ask: Ask, prompt: Prompt, now: float) -> list[Way]:
        workers = self._fleet.health.usable(self._replica.workers.values(), now)
        decoding = self._with_room("decode", candidates(workers, "decode", ask.model))
        loads, pool = self._pool("decode", decoding, now)
        found = self._decodes(prompt, decoding, loads, pool)
        prefilling = candidates(workers, "prefill", ask.model)
        prefills = self._prefills(prompt, prefilling, *self._pool("prefill", prefilling, now))
        if prefills:
            best = min(prefills, key=lambda way: way.total)
            rates, besides = self._learnt.rates, self._hand_over_seconds
            found += [after_prefill(prompt, best, w, rates(w), load, pool, besides) for w, load in zip(decoding, loads, strict=True)]
        return sorted(found, key=lambda way: way.total)

    def _with_room(self, role: Role, able: list[Worker]) -> list[Worker]:
        """Those whose engine would run one more now, where there are any: at another it waits until an answer there ends, which no rate tells of."""
        if role == "prefill":
            return able
        return [w for w in able if self._fleet.requests(w.worker) < self._settings.worker_requests_max] or able

    def _decodes(self, prompt: Prompt, able: Sequence[Worker], loads: Sequence[Load], pool: Pool) -> list[Way]:
        return [decode_alone(prompt, w, self._learnt.rates(w), load, pool) for w, load in zip(able, loads, strict=True)]

    def _prefills(self, prompt: Prompt, able: Sequence[Worker], loads: Sequence[Load], pool: Pool) -> list[Way]:
        return [prefill_leg(prompt, w, self._learnt.rates(w), load, pool, self._leg_seconds) for w, load in zip(able, loads, strict=True)]

    def _pool(self, role: Role, able: Sequence[Worker], now: float) -> tuple[list[Load], Pool]:
        loads = [self._fleet.load(w.worker, now) for w in able]
        return loads, self._fleet.pool(role, loads, now)


def _averaged(before: float, seconds: float) -> float:
    """What a leg takes besides what was thought of, now that it took so much."""
    return _LEG_KEPT * before + (1 - _LEG_KEPT) * max(0.0, seconds)


def make_policy(settings: RouterSettings, replica: Replica, fleet: Fleet, learnt: Learnt) -> Policy:
    """The policy that the settings name."""
    return ByCost(settings, replica, fleet, learnt) if settings.policy == "cost" else ByRule(settings, replica, fleet)
