"""A full engine: requests that share a prefix run together. The real scheduler half and the simulated scheduler, in simulated time."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest

from cachebus.engine.passing import Passing
from cachebus.engine.scheduler_half import SchedulerHalf
from cachebus.engine.views import Policy, RequestView
from cachebus.messages import Acquire, Extent, Granted, Reply, Request
from deploy.scaling.store import Unheard
from deploy.sim.profile import Profile
from deploy.sim.scheduler import Scheduler, Work

BLOCK, CHUNK = 16, 256
PROMPTS, PROMPT, QUESTION, ANSWER = 12, 4096, 64, 64
REQUEST_BLOCKS = (PROMPT + QUESTION + ANSWER) // BLOCK
FITTING = 3.7
"""So many requests of different prompts have room, as 16 GB have of 4.3 GB each."""
HEAVIER = 8
"""A token weighs so much more than one of an 8B model: prompts of 4,096 tokens take what 32,768 do."""
PROFILE = Profile(
    block_size=BLOCK,
    blocks=int(FITTING * REQUEST_BLOCKS),
    max_model_len=8192,
    kv_bytes_per_token=131_072 * HEAVIER,
    prefill_tokens_per_second=((1, 40_000.0 / HEAVIER), (2048, 43_500.0 / HEAVIER)),
    attention_ns_per_pair=0.84 * HEAVIER,
    decode_ms=((1, 14.0), (64, 18.0), (256, 30.0)),
    decode_ns_per_context_token=33.0 * HEAVIER,
)
SECONDS = 40.0


class Store:
    """A bus that grants at once what was published."""

    def __init__(self) -> None:
        self.there: set[bytes] = set()
        self._replies: list[tuple[int, Reply]] = []
        self._tickets = itertools.count(1)

    def submit(self, body: Request) -> int:
        ticket = next(self._tickets)
        if isinstance(body, Acquire):
            keys = list(itertools.takewhile(self.there.__contains__, body.keys))
            self._replies.append((ticket, Granted(ticket if keys else 0, [Extent(key, 0, 4096, b"") for key in keys])))
        return ticket

    def poll(self, wait_ms: float = 0) -> list[tuple[int, Reply]]:
        replies, self._replies = self._replies, []
        return replies


@dataclass
class Clients:
    """They ask one after another, each in a loop; a share ``reuse`` of what they ask begins with one of the prompts."""

    engine: FullEngine
    count: int
    reuse: float
    ended: int = 0
    waited: list[float] = field(default_factory=list)
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def ask(self, now: float) -> None:
        prompt = self.chance.randrange(PROMPTS) if self.chance.random() < self.reuse else self.chance.randrange(PROMPTS, 1 << 30)
        question = self.chance.randrange(1 << 30)
        self.engine.add(str(question), [prompt, *range(PROMPT - 1), question, *range(QUESTION - 1)], now)

    def run(self, seconds: float) -> float:
        """Requests a second."""
        for _ in range(self.count):
            self.ask(0.0)
        now = 0.0
        while now < seconds:
            now, ended, began = self.engine.step(now)
            self.ended += len(ended)
            self.waited += began
            for _ in ended:
                self.ask(now)
        return self.ended / seconds


class FullEngine:
    """Steps take what the profile says; pulls go on beside them, one after the other."""

    def __init__(self) -> None:
        self.store = Store()
        self.half = SchedulerHalf(Policy("one", ["holder"], b"n" * 32, b"l" * 16, CHUNK, BLOCK, False, 200, BLOCK), self.store)
        self.scheduler = Scheduler(PROFILE, self.half, Unheard(BLOCK))
        self._pulls: list[tuple[float, str]] = []
        self._free_at = 0.0
        self._asked: dict[str, float] = {}

    def add(self, name: str, tokens: list[int], now: float) -> None:
        work = Work(name, list(tokens), ANSWER)
        self._asked[name] = now
        self.scheduler.add(work)
        self.half.add(RequestView(name, work.tokens, len(tokens), "", True, None))

    def step(self, now: float) -> tuple[float, list[Work], list[float]]:
        """The time after a step, the requests that ended in it, and how long those waited that began to answer."""
        for pull in [pull for pull in self._pulls if pull[0] <= now]:
            self._pulls.remove(pull)
            self.scheduler.load_finished(pull[1], ())
        step = self.scheduler.schedule(now * 1000)
        plan = self.half.step([part.scheduled for part in step.parts], step.preempted)
        for load in plan.loads:
            tokens = sum(len(piece.blocks) - piece.blocks.count(-1) for piece in load.pieces) * BLOCK
            self._free_at = max(self._free_at, now) + PROFILE.pull_seconds(tokens)
            self._pulls.append((self._free_at, load.request_id))
        prefill = [(part.scheduled.computed, part.tokens) for part in step.parts if part.tokens > 1]
        contexts = [part.scheduled.computed for part in step.parts if part.tokens == 1]
        after = now + (PROFILE.step_seconds(prefill, contexts) if step.parts else 0.001)
        self.store.there.update(save.key for save in plan.saves)
        began: list[float] = []
        sampled: list[int | None] = []
        for part in step.parts:
            samples = part.scheduled.computed + part.tokens >= len(part.work.tokens)
            sampled.append(7 if samples else None)
            if samples and not part.work.generated:
                began.append(after - self._asked[part.work.request_id])
        return after, self.scheduler.advance(step, sampled), began


def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own order."""
    monkeypatch.setattr(Passing, "lets_pass", lambda *_arguments, **_named: False)
    monkeypatch.setattr(Passing, "is_coming", lambda *_arguments, **_named: False)


def rate(clients: int, reuse: float) -> tuple[float, float]:
    """Requests a second, and the longest wait for a first token."""
    some = Clients(FullEngine(), clients, reuse)
    return some.run(SECONDS), max(some.waited)


@pytest.mark.parametrize(("clients", "reuse", "times"), [(50, 0.8, 1.6), (50, 0.95, 2.3), (200, 0.95, 3.0), (10, 0.95, 1.1)])
def test_who_shares_a_prefix_runs_together_and_nobody_waits_longer(
    clients: int, reuse: float, times: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, longest = rate(clients, reuse)
    strict(monkeypatch)
    theirs, longest_of_theirs = rate(clients, reuse)
    with capsys.disabled():
        print(f"\n{clients} clients, {reuse:.0%}: {ours:.2f} requests a second, in strict order {theirs:.2f};", end="")
        print(f" longest wait {longest:.1f} s, in strict order {longest_of_theirs:.1f} s")
    assert ours >= times * theirs
    assert longest <= 1.25 * longest_of_theirs
