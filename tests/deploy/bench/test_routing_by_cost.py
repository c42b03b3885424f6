"""The router's costs in simulated time, against the rule that sends what lacks much through prefill: where few decode workers answer all."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

import pytest

from cachebus.messages import Worker
from deploy.bench.trace import BLOCK_TOKENS, Arrival
from deploy.scaling.replay import Goal, Plant, Replay
from deploy.scaling.routing import CostRouter
from deploy.scaling.worker import GRAIN
from deploy.sim.profile import Profile
from router.costs import Prompt, Way

PROFILE = Profile(
    blocks=5000,
    max_model_len=8192,
    max_num_batched_tokens=2048,
    max_num_seqs=64,
    prefill_tokens_per_second=((1, 20_480.0),),
    attention_ns_per_pair=0.0,
    decode_ms=((1, 4.0), (64, 6.0)),
    decode_ns_per_context_token=0.0,
)
"""2,048 tokens take 100 ms."""
BLOCKS, SHARED, PREFIXES, ANSWER, SECONDS = 4, 3, 8, 8, 40.0
TOKENS_MIN = 1024
LATER_MAX = 1.05
"""A client's second between tokens counts as much as one before the first, so a little may be given for those."""


class RuleRouter(CostRouter):
    """What lacks ``TOKENS_MIN`` tokens goes through prefill, each leg to the worker with the fewest requests."""

    def way(self, prompt: Prompt, prefill: Sequence[Worker], decode: Sequence[Worker], now: float) -> Way:
        pull, compute, tokens = prompt.made_ready("", self._rates)
        through_prefill = prefill and prompt.tokens - len(prompt.tiers) * prompt.chunk_tokens >= TOKENS_MIN // GRAIN
        taken = min(prefill if through_prefill else decode, key=lambda worker: self._fleet.requests(worker.worker)).worker
        return Way(taken if through_prefill else "", "" if through_prefill else taken, 0.0, pull, compute, 0.0, tokens)


def traffic(rate: float, seed: int) -> list[Arrival]:
    """Poisson arrivals; three in ten begin with one of eight prefixes."""
    chance, at, fresh, found = random.Random(seed), 0.0, seed << 20, list[Arrival]()
    while (at := at + chance.expovariate(rate)) < SECONDS:
        shared = SHARED if chance.random() < 0.3 else 0
        first = SHARED * chance.randrange(PREFIXES)
        found.append(Arrival(at, BLOCKS * BLOCK_TOKENS, ANSWER, (*range(first, first + shared), *range(fresh, fresh + BLOCKS - shared))))
        fresh += BLOCKS
    return found


def mean_ttft(arrivals: Sequence[Arrival], sizes: tuple[int, int], *, by_rule: bool) -> float:
    replay = Replay(Plant(PROFILE, 0.0, 1 << 40), Goal(1e9, 1e9, 0.0), sizes, None)
    if by_rule:
        replay._router = RuleRouter(replay._fleet, replay._router._rates)
    return statistics.fmean(replay.run(arrivals, SECONDS).ttft)


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize(("sizes", "rate"), [((3, 1), 30.0), ((3, 1), 20.0), ((2, 1), 20.0), ((3, 2), 30.0), ((4, 8), 45.0)])
def test_what_costs_least_is_hardly_later_than_by_rule(sizes: tuple[int, int], rate: float, seed: int) -> None:
    """With one decode worker it was, as long as nobody counted those who come there while it computes a prompt."""
    arrivals = traffic(rate, seed)
    cost, rule = (mean_ttft(arrivals, sizes, by_rule=by_rule) for by_rule in (False, True))
    print(f"{sizes[0]}+{sizes[1]} workers, {rate:g} requests a second: {cost:.3f} s by cost, {rule:.3f} s by rule")
    assert cost <= LATER_MAX * rule
