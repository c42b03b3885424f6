"""What this router has under way at each worker, and what it learns from that. Pure: the time is passed in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from cachebus.messages import Worker
from cachebus.messages_routers import WorkerLoad
from cachebus.wire import Role
from router.costs import Load, Pool
from router.health import Health

_POOL_SECONDS = 10.0
"""Over how long a pool's utilisation is taken, and how many come to it."""

_KEPT = 0.98
"""What of all that was learnt of answers still counts after one more."""

_TOKENS_ASSUMED = 128.0
"""Tokens of an answer, until some have ended."""


def serves(worker: Worker, model: str) -> bool:
    """Whether clients find that model, or LoRA adapter, there."""
    return model == worker.model or model in worker.adapters


def candidates(workers: Iterable[Worker], role: Role, model: str | None, without: Collection[str] = ()) -> list[Worker]:
    """Those that may take a leg: of ``role``, serving ``model`` (None: any), not draining, none of ``without``."""
    return [w for w in workers if w.role == role and not w.draining and (model is None or serves(w, model)) and w.worker not in without]


_NOTHING = WorkerLoad(0, 0, 0.0)


@dataclass(eq=False)
class Leg:
    """A request at a worker. ``seconds``: what it computes there before its first token, as far as that can be told before.

    ``begun``: when it came; ``beside``: how many others were generating there then; ``turn``: since when no other prompt is before it;
    ``tokens``: how many of its answer came, where that is counted; ``blocks``: what its prompt takes of KV, 0 where it was not counted.
    """

    worker: str
    role: Role
    seconds: float
    begun: float
    beside: int
    turn: float | None = None
    first_token: float | None = None
    tokens: int = 0
    blocks: int = 0


class Fleet:
    """Legs under way by worker, in the order in which they began. ``others`` says what other routers have there.

    ``prefill_tokens_min``: from how many computed tokens on a prompt is a prefill worker's, wherever it is computed.
    """

    def __init__(self, prefill_tokens_min: int = 1) -> None:
        self._tokens_min = prefill_tokens_min
        self.others: Callable[[], Mapping[str, WorkerLoad]] = dict
        self.in_flight: Counter[str] = Counter()
        self.health = Health()
        self._legs: dict[str, list[Leg]] = {}
        self.prefill_seconds = 0.0
        """Seconds of computing long prompts that ever began, at whatever worker; of all prompts, at decode workers; and legs that ever ended."""
        self.decode_seconds = 0.0
        self.ended: Counter[Role] = Counter()
        # Of each pool lately: seconds of computing and legs that began, older ones counting less, and when that was so.
        self._begun: dict[Role, tuple[float, float, float]] = {}
        self._pace = _Pace()

    def begin(self, worker: Worker, seconds: float, now: float, tokens: int = 0, computed: int = 0) -> Leg:
        """A leg goes to a worker; ``tokens``: its prompt's, where they were counted; ``computed``: those of them that are computed there."""
        legs = self._legs.setdefault(worker.worker, [])
        leg = Leg(worker.worker, worker.role, seconds, now, sum(other.first_token is not None for other in legs))
        leg.blocks = -(-tokens // worker.block_size)
        self.decode_seconds += seconds if worker.role == "decode" else 0.0
        self.prefill_seconds += seconds if worker.role == "prefill" or computed >= self._tokens_min else 0.0
        legs.append(leg)
        self._give_turn(legs, now)
        self.in_flight[worker.worker] += 1
        computing, came = self._lately(worker.role, now)
        self._begun[worker.role] = (computing + seconds, came + 1, now)
        return leg

    def token(self, leg: Leg, now: float) -> None:
        """Its first token has come."""
        leg.first_token = now
        self._give_turn(self._legs[leg.worker], now)

    def end(self, leg: Leg, now: float) -> None:
        """It has ended, well or not."""
        self._legs[leg.worker].remove(leg)
        self._give_turn(self._legs[leg.worker], now)
        self.in_flight[leg.worker] -= 1
        self.ended[leg.role] += 1
        if leg.first_token is not None and leg.tokens > 1:
            self._pace.add((now - leg.first_token) / (leg.tokens - 1), leg.beside + 1, leg.tokens)

    def load(self, worker: str, now: float) -> Load:
        """What a worker has before it. Prompts are computed one after the other; one that takes longer than was told ends now."""
        own, theirs = self._own(worker, now), self.others().get(worker, _NOTHING)
        running = own.running + theirs.running
        return Load(own.backlog_seconds + theirs.backlog_seconds, running, self._pace.joining(running))

    def requests(self, worker: str) -> int:
        """All that routers have there."""
        return self.in_flight[worker] + self.others().get(worker, _NOTHING).in_flight

    def told(self, now: float) -> dict[str, WorkerLoad]:
        """This router's own, for other routers."""
        return {worker: self._own(worker, now) for worker, legs in self._legs.items() if legs}

    def prefill_backlog(self, workers: Collection[Worker], now: float) -> float:
        """Seconds of computing prompts that this router's requests have before them: in the prefill pool, or on decode workers where it is empty."""
        pool = candidates(workers, "prefill", None) or candidates(workers, "decode", None)
        told = self.told(now)
        return sum(told[worker.worker].backlog_seconds for worker in pool if worker.worker in told)

    def prompts(self, workers: Iterable[Worker]) -> int:
        """How many of this router's requests have not had their first token from these workers."""
        return sum(leg.first_token is None for worker in workers for leg in self._legs.get(worker.worker, ()))

    def blocks_wanted(self) -> int:
        """KV blocks that the largest prompt takes that waits at a decode worker for its first token."""
        waiting = (leg for legs in self._legs.values() for leg in legs if leg.role == "decode" and leg.first_token is None)
        return max((leg.blocks for leg in waiting), default=0)

    @property
    def alone_seconds(self) -> float:
        """Seconds between the tokens of a stream that nobody shares its worker with, as far as answers told; 0: unknown."""
        return self._pace.alone

    def _own(self, worker: str, now: float) -> WorkerLoad:
        legs = self._legs.get(worker, [])
        until = float("-inf")
        for leg in legs:
            if leg.first_token is None:
                until = max(now, (until if leg.turn is None else leg.turn) + leg.seconds)
        return WorkerLoad(len(legs), sum(leg.first_token is not None for leg in legs), max(now, until) - now)

    @staticmethod
    def _give_turn(legs: list[Leg], now: float) -> None:
        head = next((leg for leg in legs if leg.first_token is None), None)
        if head is not None and head.turn is None:
            head.turn = now

    def pool(self, role: Role, loads: Collection[Load], now: float) -> Pool:
        """The workers of a role that have these loads; what came and was computed lately is this router's own."""
        computing, came = self._lately(role, now)
        workers = max(1, len(loads))
        backlog = sum(load.backlog for load in loads) / workers
        return Pool(workers, came / _POOL_SECONDS, backlog, computing / (_POOL_SECONDS * workers))

    def _lately(self, role: Role, now: float) -> tuple[float, float]:
        computing, came, at = self._begun.get(role, (0.0, 0.0, now))
        kept = math.exp((at - now) / _POOL_SECONDS)
        return computing * kept, came * kept


class _Pace:
    """How much later all of a batch get each token for one more in it: a straight line through the answers seen, old ones counting less."""

    def __init__(self) -> None:
        # Sums of 1, requests, requests², interval and interval * requests: the normal equations of the line.
        self._sums = [0.0] * 5
        self._tokens = _TOKENS_ASSUMED

    def add(self, interval: float, requests: int, tokens: int) -> None:
        """An answer of ``tokens`` that came one an ``interval`` (seconds) in a batch of ``requests``."""
        terms = (1.0, requests, requests * requests, interval, interval * requests)
        self._sums = [_KEPT * total + term for total, term in zip(self._sums, terms, strict=True)]
        self._tokens = self._tokens * _KEPT + tokens * (1 - _KEPT)

    def joining(self, running: int) -> float:
        """Seconds that one more costs those who run, and itself."""
        return 2 * self._slope * running * self._tokens

    @property
    def alone(self) -> float:
        """The line's interval in a batch of one; 0 where all answers had the same company."""
        n, x, _, y, _ = self._sums
        return max(0.0, (y - self._slope * (x - n)) / n) if self._slope else 0.0

    @property
    def _slope(self) -> float:
        n, x, xx, y, xy = self._sums
        spread = n * xx - x * x
        return max(0.0, (n * xy - x * y) / spread) if spread > 1e-6 * n * xx else 0.0
