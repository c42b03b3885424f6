"""What each way of serving a prompt would cost, in seconds. Pure.

A way is a decode worker alone, or a prefill worker and then a decode worker. Its seconds are the client's own (queue, transfer, computing), and
those that it takes from others: who generates beside a prompt that is being computed gets its tokens that much later, who comes to a decode worker
meanwhile waits for it, and who comes next finds a pool that is busier. A client's second and another's count alike, so there are no weights; the
rates are those that the engines have learnt (``cachebus.engine.break_even``), and what is not known yet is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cachebus.messages import Report, Worker
from cachebus.wire import Tier

NEAREST_FIRST: tuple[Tier, ...] = ("dram", "peer", "nvme", "redis")

_UTILISATION_MAX = 0.9
"""Past it a pool counts as no busier: what is learnt over some seconds may well be more than there is."""

TOKEN_SECONDS_ASSUMED = 1e-4
BYTE_SECONDS_ASSUMED = 1e-10
"""Ten thousand tokens and ten gigabytes a second: between a processor and a large GPU, until the first engine reports."""


@dataclass(frozen=True)
class Rates:
    """Seconds a token computed, a token attended to, and a byte pulled from each tier."""

    token_seconds: float = TOKEN_SECONDS_ASSUMED
    attended_seconds: float = 0.0
    byte_seconds: Mapping[Tier, float] = field(default_factory=dict)

    def compute(self, first: int, last: int) -> float:
        """Seconds for a prompt's tokens from ``first`` to ``last``."""
        return self.token_seconds * (last - first) + self.attended_seconds * (last * last - first * first) / 2

    def pull(self, tiers: Sequence[Tier], chunk_bytes: int) -> float:
        """Seconds for chunks that lie in these tiers: they come side by side, and all are copied from DRAM."""
        if not tiers:
            return 0.0
        counts = {tier: tiers.count(tier) for tier in set(tiers)} | {"dram": len(tiers)}
        return max(count * chunk_bytes * self.byte_seconds.get(tier, BYTE_SECONDS_ASSUMED) for tier, count in counts.items())


class Learnt:
    """The rates of each worker, as its engine reported them last; another worker's of the model where it has not learnt one itself."""

    def __init__(self) -> None:
        self._reported: dict[str, Report] = {}
        self._models: dict[str, str] = {}
        self._rates: dict[tuple[str, str], Rates] = {}

    def take(self, report: Report, model: str) -> None:
        """A worker that serves ``model`` has reported."""
        # Put last again: who reported last speaks for those that know nothing.
        before = self._reported.pop(report.worker, None)
        if before is None or _learnt(before) != _learnt(report) or self._models.get(report.worker) != model:
            self._rates.clear()
        self._reported[report.worker] = report
        self._models[report.worker] = model

    def forget(self, worker: str) -> None:
        """The worker is gone."""
        self._reported.pop(worker, None)
        self._models.pop(worker, None)
        self._rates.clear()

    def rates(self, worker: Worker) -> Rates:
        """What is known of a worker. Every way of every request asks, and reports seldom bring anything new."""
        of = worker.worker, worker.model
        if of not in self._rates:
            self._rates[of] = self._known(worker)
        return self._rates[of]

    def _known(self, worker: Worker) -> Rates:
        others = [report for name, report in reversed(self._reported.items()) if self._models[name] == worker.model and name != worker.worker]
        own = self._reported.get(worker.worker)
        known = [*([own] if own else []), *others]
        # Short prompts tell little of long ones: who has seen far longer ones than the worker itself speaks for it.
        longest = max((report.longest_tokens for report in known), default=0)
        computing = next((report for report in known if report.longest_tokens and 2 * report.longest_tokens >= longest), None)
        byte_seconds: dict[Tier, float] = {}
        for report in known:
            byte_seconds = {**report.byte_seconds, **byte_seconds}
        if computing is None:
            return Rates(byte_seconds=byte_seconds)
        return Rates(computing.token_seconds, computing.attended_seconds, byte_seconds)


def _learnt(report: Report) -> tuple[float, float, Mapping[Tier, float], int]:
    return report.token_seconds, report.attended_seconds, report.byte_seconds, report.longest_tokens


@dataclass(frozen=True)
class Prompt:
    """A prompt of ``tokens``; ``tiers``: the nearest tier of each of its first chunks, as far as any has them; ``hbm``: the same in whose HBM."""

    tokens: int
    chunk_tokens: int
    chunk_bytes: int
    tiers: Sequence[Tier]
    hbm: Mapping[str, int] = field(default_factory=dict)

    def as_if_stored(self, chunks: int) -> Prompt:
        """The same prompt once its first ``chunks`` were published or pulled by somebody: then they are in DRAM."""
        near: list[Tier] = ["dram"] * chunks
        return Prompt(self.tokens, self.chunk_tokens, self.chunk_bytes, [*near, *self.tiers[chunks:]], self.hbm)

    def made_ready(self, worker: str, rates: Rates) -> tuple[float, float, int]:
        """Seconds of pulling and of computing on that worker, and tokens computed: with what is stored, or without where that is sooner."""
        near = min(self.hbm.get(worker, 0), self.tokens // self.chunk_tokens)
        # The last token is computed whatever is stored.
        first, last = min(near * self.chunk_tokens, self.tokens - 1), self.tokens
        alone = rates.compute(first, last)
        if len(self.tiers) <= near:
            return 0.0, alone, last - first
        pull = rates.pull(self.tiers[near:], self.chunk_bytes)
        stored = min(len(self.tiers) * self.chunk_tokens, last - 1)
        rest = rates.compute(stored, last)
        return (pull, rest, last - stored) if pull + rest <= alone else (0.0, alone, last - first)


@dataclass(frozen=True)
class Load:
    """A worker now: seconds of computing that it has before it, requests that generate on it, and what one more costs all of them together."""

    backlog: float = 0.0
    running: int = 0
    joining: float = 0.0


@dataclass(frozen=True)
class Pool:
    """The workers of a role: how many, legs that come a second, mean seconds of computing before one, share of the time in which they compute."""

    workers: int = 1
    arrivals: float = 0.0
    backlog: float = 0.0
    utilisation: float = 0.0


@dataclass(frozen=True)
class Way:
    """One way and its seconds. ``prefill`` is "" where the decode worker is alone; ``others`` are the seconds that others wait longer.

    ``tokens`` of the prompt are computed on it.
    """

    prefill: str = ""
    decode: str = ""
    queue: float = 0.0
    pull: float = 0.0
    compute: float = 0.0
    others: float = 0.0
    tokens: int = 0

    @property
    def own(self) -> float:
        """What the client waits for its first token."""
        return self.queue + self.pull + self.compute

    @property
    def total(self) -> float:
        """Its cost."""
        return self.own + self.others


def crowding(utilisation: float) -> float:
    """How many seconds those who come later wait for every second of computing given to a pool that is busy for that share of its time.

    The mean wait in a queue with one server grows as rho / (1 - rho) (Pollaczek and Khinchine).
    """
    rho = min(utilisation, _UTILISATION_MAX)
    return rho / (1 - rho)


def delayed(seconds: float, pool: Pool) -> float:
    """How many seconds all those wait longer who come to a pool while it works off ``seconds`` of computing that one of its workers is given.

    A server that has ``v`` seconds before it and is given ``x`` more delays by x who comes within v / (1 - rho), and then, for x / (1 - rho), by ever
    less: what one customer costs the others of an M/G/1 queue (Haviv and Ritov, Management Science 44(6), 1998). Whoever comes to a pool goes where
    least is before it, so each of its workers is taken to bear a share.
    """
    share = seconds / pool.workers
    return pool.arrivals * share * (pool.backlog + share / 2) / (1 - min(pool.utilisation, _UTILISATION_MAX))


def decode_alone(prompt: Prompt, worker: Worker, rates: Rates, load: Load, pool: Pool) -> Way:
    """The decode worker pulls what is stored and computes the rest between the tokens of those it serves.

    Answers, hits and hand-overs come to decode workers all the time, so the rest is in the way of them, too.
    """
    pull, compute, tokens = prompt.made_ready(worker.worker, rates)
    others = compute * load.running + delayed(compute, pool) + load.joining
    return Way("", worker.worker, load.backlog, pull, compute, others, tokens)


def after_prefill(prompt: Prompt, prefill: Way, worker: Worker, rates: Rates, load: Load, pool: Pool, hand_over_seconds: float) -> Way:
    """A prefill worker, then the decode worker, which pulls all that it does not have.

    ``hand_over_seconds``: from the one's end to the other's first token, besides the pull and what is computed.
    """
    whole = prompt.as_if_stored(prompt.tokens // prompt.chunk_tokens)
    then = decode_alone(whole, worker, rates, load, pool)
    # What is before it at the decode worker is done meanwhile.
    queue = prefill.queue + max(0.0, then.queue - prefill.own) + hand_over_seconds
    pull, compute, others = prefill.pull + then.pull, prefill.compute + then.compute, prefill.others + then.others
    return Way(prefill.prefill, worker.worker, queue, pull, compute, others, prefill.tokens)


def prefill_leg(prompt: Prompt, worker: Worker, rates: Rates, load: Load, pool: Pool, leg_seconds: float) -> Way:
    """The first leg alone. ``leg_seconds``: what a leg takes besides what is computed."""
    pull, compute, tokens = prompt.made_ready(worker.worker, rates)
    return Way(worker.worker, "", load.backlog + leg_seconds, pull, compute, compute * crowding(pool.utilisation), tokens)
