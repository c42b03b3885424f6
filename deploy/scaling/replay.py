"""A day's arrivals on two pools in simulated time: fixed ones, or scaled as the router's own rule says.

Fleet, costs, readings and rule are the router's own; rates are known instead of learnt, HBM is not looked at, and a decode leg begins when its
prefill leg has ended. A new worker takes requests after ``start_seconds``; one that is to go takes no new ones and ends what it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from cachebus.keys import chunk_keys, root_key
from cachebus.messages import Worker
from cachebus.wire import Role
from deploy.bench.trace import Arrival
from deploy.scaling.routing import CostRouter, rates_of
from deploy.scaling.store import Store
from deploy.scaling.worker import BLOCK_TOKENS, GRAIN, Events, SimulatedWorker, coarse
from deploy.sim.profile import Profile
from router.costs import Prompt, Way
from router.fleet import Fleet, Leg
from router.metrics import RouterMetrics
from router.scaler import Scaler, Surroundings
from router.scaling_settings import ScalingSettings

POLL_SECONDS = 15.0
_HPA_SECONDS = 60.0
"""How often sizes are asked for; of how long the highest answer counts where a pool would shrink, as the chart has it."""
SAMPLE_SECONDS = 300.0
ROLES: tuple[Role, Role] = ("prefill", "decode")


@dataclass(frozen=True)
class Goal:
    """What ``share`` of the requests should keep to: the first token so long after what the prompt takes alone, and the mean between tokens."""

    ttft_seconds: float
    itl_seconds: float
    share: float


@dataclass(frozen=True)
class Plant:
    """What is simulated. ``store_tokens``: how many tokens of prefixes all tiers keep."""

    profile: Profile
    start_seconds: float
    store_tokens: int
    prefill_tokens_min: int = 1024


@dataclass
class Outcome:
    """What became of a day. ``pools``: prefill and decode workers that were paid for, by seconds after the beginning; ``broken``: it was given up."""

    requests: int = 0
    met: int = 0
    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    met_ttft: int = 0
    met_itl: int = 0
    worker_seconds: dict[Role, float] = field(default_factory=lambda: dict.fromkeys(ROLES, 0.0))
    pools: list[tuple[float, int, int]] = field(default_factory=list)
    broken: bool = False

    @property
    def share(self) -> float:
        """Share of the requests that met both goals."""
        return self.met / max(1, self.requests)

    @property
    def hours(self) -> float:
        """Worker-hours of both pools."""
        return sum(self.worker_seconds.values()) / 3600


@dataclass(eq=False)
class _Slot:
    """A worker that is paid for from ``since`` on; ``ready``: whether it takes requests yet."""

    worker: SimulatedWorker
    since: float
    known: Worker
    ready: bool = False
    draining: bool = False


@dataclass(eq=False)
class _Request:
    arrival: Arrival
    names: list[bytes]
    alone_seconds: float
    leg: Leg | None = None
    first: float = 0.0


class Replay:
    """One day. ``rule``: None for pools that stay as they begin. ``given_up``: whether to stop once the goal's share can't be kept any more."""

    def __init__(self, plant: Plant, goal: Goal, sizes: tuple[int, int], rule: ScalingSettings | None, *, gives_up: bool = False) -> None:
        self._plant, self._goal, self._rule, self._gives_up = plant, goal, rule, gives_up
        self._profile = coarse(plant.profile)
        self._events, self._fleet = Events(), Fleet(plant.prefill_tokens_min // GRAIN)
        self._router = CostRouter(self._fleet, rates_of(self._profile))
        self._store = Store(plant.store_tokens // BLOCK_TOKENS)
        self._slots: dict[Role, list[_Slot]] = {role: [] for role in ROLES}
        self._leaving: list[tuple[Role, _Slot]] = []
        self._requests: dict[str, _Request] = {}
        self._number = 0
        self._answers: deque[tuple[float, tuple[int, int]]] = deque()
        self.outcome = Outcome()
        around = Surroundings(self._workers, lambda: 0, lambda: 0, plant.prefill_tokens_min, plant.profile.max_num_seqs)
        self._scaler = Scaler(rule, around, self._fleet, RouterMetrics()) if rule is not None else None
        for role, size in zip(ROLES, sizes, strict=True):
            for _ in range(size):
                self._start(role, 0.0)

    def run(self, arrivals: Sequence[Arrival], seconds: float) -> Outcome:
        """Plays the arrivals and whatever they lead to; workers are paid for until ``seconds``, or until the last answer where that is later."""
        self._seconds, self._allowed = seconds, int(len(arrivals) * (1 - self._goal.share))
        upcoming = iter(arrivals)

        def arrive(one: Arrival) -> None:
            self._arrive(one)
            plan()

        def plan() -> None:
            one = next(upcoming, None)
            if one is not None:
                self._events.at(one.at_seconds, lambda: arrive(one))

        plan()
        if self._scaler is not None and self._rule is not None:
            self._every(float(self._rule.reading_seconds), self._decide)
            self._every(POLL_SECONDS, self._poll)
        self._every(SAMPLE_SECONDS, self._sample)
        while not self.outcome.broken and self._events.next():
            pass
        for role in ROLES:
            for slot in self._slots[role]:
                self._pay(role, slot)
        for role, slot in self._leaving:
            self._pay(role, slot)
        return self.outcome

    def _every(self, seconds: float, what: object) -> None:
        assert callable(what)

        def again() -> None:
            if self._events.now < self._seconds:
                what()
                self._events.at(self._events.now + seconds, again)

        self._events.at(0.0, again)

    def _arrive(self, one: Arrival) -> None:
        request_id, self._number = str(self._number), self._number + 1
        tokens = _tokens(one)
        names = chunk_keys(root_key(b"", ""), tokens, self._profile.block_size)
        alone = self._profile.step_seconds([(0, len(tokens))], [])
        self._requests[request_id] = _Request(one, names, alone)
        way = self._router.way(self._prompt(request_id), self._known("prefill"), self._known("decode"), self._events.now)
        if self._scaler is not None:
            self._scaler.prepared(way.tokens * GRAIN)
        if way.prefill:
            self._send("prefill", way, request_id, 1)
        else:
            self._send("decode", way, request_id, 1 + _later_tokens(one))

    def _prompt(self, request_id: str) -> Prompt:
        request, size = self._requests[request_id], self._profile.block_size
        tokens = -(-request.arrival.input_tokens // GRAIN)
        known = self._store.known(request.names[: (tokens - 1) // size])
        prompt = Prompt(tokens, size, size * self._profile.kv_bytes_per_token, ["dram"] * known)
        return prompt.as_if_stored(tokens // size) if request_id in self._store.handed_over else prompt

    def _send(self, role: Role, way: Way, request_id: str, answer: int) -> None:
        request = self._requests[request_id]
        name = way.prefill if role == "prefill" else way.decode
        (slot,) = [slot for slot in self._slots[role] if slot.worker.name == name]
        tokens = _tokens(request.arrival)
        request.leg = self._fleet.begin(slot.known, way.compute, self._events.now, len(tokens), way.tokens)
        slot.worker.add(request_id, tokens, answer, list(request.names))

    def _decode(self, request_id: str) -> None:
        way = self._router.way(self._prompt(request_id), [], self._known("decode"), self._events.now)
        # The first token comes with the prompt, each of the others stands for GRAIN.
        self._send("decode", way, request_id, 1 + _later_tokens(self._requests[request_id].arrival))

    def _known(self, role: Role) -> list[Worker]:
        return [slot.known for slot in self._able(role)]

    def _able(self, role: Role) -> list[_Slot]:
        return [slot for slot in self._slots[role] if slot.ready]

    def _first(self, role: Role, request_id: str) -> None:
        request = self._requests[request_id]
        assert request.leg is not None
        self._fleet.token(request.leg, self._events.now)
        if role == "decode":
            request.first = self._events.now

    def _ended(self, role: Role, request_id: str) -> None:
        request = self._requests[request_id]
        assert request.leg is not None
        request.leg.tokens = request.arrival.output_tokens if role == "decode" else 1
        self._fleet.end(request.leg, self._events.now)
        if role == "prefill":
            self._store.handed_over.add(request_id)
            self._decode(request_id)
            return
        del self._requests[request_id]
        self._store.handed_over.discard(request_id)
        self._count(request)

    def _count(self, request: _Request) -> None:
        one, outcome, goal = request.arrival, self.outcome, self._goal
        ttft = request.first - one.at_seconds
        itl = (self._events.now - request.first) / (GRAIN * max(1, _later_tokens(one)))
        soon, fluent = ttft <= goal.ttft_seconds + request.alone_seconds, itl <= goal.itl_seconds
        outcome.requests += 1
        outcome.ttft.append(ttft)
        outcome.itl.append(itl)
        outcome.met_ttft += soon
        outcome.met_itl += fluent
        outcome.met += soon and fluent
        outcome.broken = self._gives_up and outcome.requests - outcome.met > self._allowed

    def _workers(self) -> list[Worker]:
        return [*self._known("prefill"), *self._known("decode")]

    def _decide(self) -> None:
        assert self._scaler is not None
        for role in ROLES:
            for slot in self._able(role):
                self._scaler.take(slot.worker.name, slot.worker.reading())
        self._scaler.decide(self._events.now)

    def _poll(self) -> None:
        assert self._scaler is not None
        answer, now = self._scaler.answer(self._events.now), self._events.now
        self._leave()
        if answer is None:
            return
        self._answers.append((now, (answer["prefill"]["wanted"], answer["decode"]["wanted"])))
        while now - self._answers[0][0] >= _HPA_SECONDS:
            self._answers.popleft()
        for place, role in enumerate(ROLES):
            wanted = self._answers[-1][1][place]
            if wanted < len(self._slots[role]):
                wanted = max(sizes[place] for _, sizes in self._answers)
            self._resize(role, wanted)

    def _resize(self, role: Role, wanted: int) -> None:
        slots = self._slots[role]
        for _ in range(len(slots), wanted):
            self._start(role, self._plant.start_seconds)
        while len(slots) > wanted:
            slot = slots.pop()
            slot.draining = True
            self._leaving.append((role, slot))
        self._leave()

    def _leave(self) -> None:
        gone = [(role, slot) for role, slot in self._leaving if slot.worker.idle]
        for role, slot in gone:
            self._leaving.remove((role, slot))
            self._pay(role, slot)

    def _pay(self, role: Role, slot: _Slot) -> None:
        self.outcome.worker_seconds[role] += max(self._events.now, slot.since) - slot.since

    def _start(self, role: Role, seconds: float) -> None:
        self._number += 1
        worker = SimulatedWorker(role, f"{role}-{self._number}", self._profile, self._store, self._events)
        worker.first = lambda request_id: self._first(role, request_id)
        worker.ended = lambda request_id: self._ended(role, request_id)
        slot = _Slot(worker, self._events.now, worker.registered())

        def ready() -> None:
            slot.ready = not slot.draining

        self._slots[role].append(slot)
        if seconds:
            self._events.at(self._events.now + seconds, ready)
        else:
            ready()

    def _sample(self) -> None:
        counts = [len(self._slots[role]) + sum(of == role for of, _ in self._leaving) for role in ROLES]
        self.outcome.pools.append((self._events.now, counts[0], counts[1]))


def _later_tokens(one: Arrival) -> int:
    """Simulated tokens of an answer after the first one."""
    return -(-(one.output_tokens - 1) // GRAIN)


def _tokens(one: Arrival) -> list[int]:
    whole = [block for block in one.blocks for _ in range(BLOCK_TOKENS // GRAIN)]
    return whole[: max(1, -(-one.input_tokens // GRAIN))]
