"""Drives a scheduler half as vLLM's scheduler would, with a bus that the test answers for."""

from __future__ import annotations

from cachebus.engine.scheduler_half import SchedulerHalf
from cachebus.engine.transfer import StepPlan, TransferParams
from cachebus.engine.views import Policy, RequestView, Scheduled
from cachebus.keys import root_key
from cachebus.messages import Acquire, Extent, Granted, Reply, Request

CHUNK, BLOCK = 64, 16
POLICY = Policy("decode-0", ["holder"], b"n" * 32, b"l" * 16, CHUNK, BLOCK, True, 200, 32)
ROOT = root_key(POLICY.namespace)


class Bus:
    """Keeps what was sent; replies are put in by the test."""

    def __init__(self) -> None:
        self.sent: list[Request] = []
        self.replies: list[tuple[int, Reply]] = []
        self.late: list[tuple[int, Reply]] = []
        self.waits: list[float] = []

    def submit(self, body: Request) -> int:
        self.sent.append(body)
        return len(self.sent)

    def poll(self, wait_ms: float = 0) -> list[tuple[int, Reply]]:
        if wait_ms:
            self.waits.append(wait_ms)
            self.replies += self.late
        replies, self.replies = self.replies, []
        return replies

    def of(self, kind: type) -> list[Request]:
        return [body for body in self.sent if isinstance(body, kind)]

    def grant(self, count: int, lease: int = 5, of_last: int = 1) -> None:
        """Answers the last Acquire, or the one ``of_last`` from the end, with its first ``count`` keys."""
        ticket, request = [(n, b) for n, b in enumerate(self.sent, 1) if isinstance(b, Acquire)][-of_last]
        extents = [Extent(key, place * 4096, 4096, b"d" * 32) for place, key in enumerate(request.keys[:count])]
        self.replies.append((ticket, Granted(lease if count else 0, extents)))


class Engine:
    """A request's life as vLLM's scheduler would drive it."""

    def __init__(self, tokens: int, policy: Policy = POLICY, **view: object) -> None:
        self.bus = Bus()
        self.half = SchedulerHalf(policy, self.bus)
        self.tokens = list(range(tokens))
        fields: dict[str, object] = {"salt": "", "may_pull": True, "transfer": TransferParams("id", "decode"), **view}
        self.half.add(RequestView("r", self.tokens, tokens, **fields))  # type: ignore[arg-type]

    def plan(self, blocks: range | list[int], computed: int, scheduled: int, *, restarted: bool = False) -> StepPlan:
        return self.half.step([Scheduled("r", list(blocks), restarted, computed, scheduled)], ())

    def step(self, blocks: range | list[int], computed: int, scheduled: int, *, restarted: bool = False) -> list[tuple[bytes, list[int], bool]]:
        plan = self.plan(blocks, computed, scheduled, restarted=restarted)
        return [(save.key, save.blocks, save.tail) for save in plan.saves]
