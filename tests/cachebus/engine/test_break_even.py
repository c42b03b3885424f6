"""What is sooner pulled and what sooner computed, against times that are made up and known."""

from __future__ import annotations

import random

import pytest

from cachebus.engine.break_even import FORGOTTEN_AFTER_SECONDS, BreakEven, Piece, PullTook, StepTook, attended, of_prompts
from cachebus.wire import Tier

A, B = 2e-5, 1e-9
"""Seconds a token, and a token attended to: 8,192 tokens take 0.2 s, 131,072 take 11 s."""
CHUNK, CHUNK_BYTES = 256, 32 << 20


def step(first: int, last: int, noise: float = 0.0) -> StepTook:
    seconds = A * (last - first) + B * attended(first, last)
    return StepTook(last - first, attended(first, last), seconds * (1 + noise))


def learnt(*, noise: float = 0.0) -> BreakEven:
    chance = random.Random(1)
    even = BreakEven()
    for _ in range(4):
        for first in range(0, 65536, 8192):
            even.add(step(first, first + 8192, chance.uniform(-noise, noise)), 0)
    return even


def pieces(*tiers: Tier) -> list[Piece]:
    return [Piece(tier, CHUNK_BYTES, (number + 1) * CHUNK) for number, tier in enumerate(tiers)]


def seconds_of(even: BreakEven, first: int, last: int) -> float:
    found = even.compute_seconds(first, last)
    assert found is not None
    return found


@pytest.mark.parametrize(("first", "last"), [(0, 2048), (0, 131072), (120000, 131072)])
def test_what_a_prompt_takes_is_learnt_from_steps(first: int, last: int) -> None:
    expected = step(first, last).seconds
    assert seconds_of(learnt(), first, last) == pytest.approx(expected, rel=0.01)
    assert seconds_of(learnt(noise=0.05), first, last) == pytest.approx(expected, rel=0.15)


def test_steps_that_are_all_alike_still_give_a_rate() -> None:
    even = BreakEven()
    for _ in range(3):
        even.add(step(0, 2048), 0)
    assert seconds_of(even, 0, 2048) == pytest.approx(step(0, 2048).seconds, rel=0.01)
    assert seconds_of(even, 0, 4096) > 0


def prompt_of_twenty(generating: int, *, prompts_alone: bool) -> float:
    """What an engine thinks that 20 tokens take, after steps of 40 ms in which that many answers of 20 tokens went on."""
    chance, even = random.Random(1), BreakEven()
    for _ in range(2000):
        fresh = [(0, 20)] if chance.random() < generating / 20 else []
        parts = [*fresh, *[(30, 1)] * (generating - len(fresh))]
        seconds = 0.04 + A * 20 * len(fresh)
        whole = sum(tokens for _, tokens in parts), sum(attended(before, before + tokens) for before, tokens in parts)
        even.add(StepTook(*(of_prompts(parts) if prompts_alone else whole), seconds), 0)
    return seconds_of(even, 0, 20)


def test_an_engine_that_generates_for_few_does_not_think_itself_slow_at_prompts() -> None:
    few, many = (prompt_of_twenty(generating, prompts_alone=True) for generating in (2, 16))
    assert few < 2 * many
    few, many = (prompt_of_twenty(generating, prompts_alone=False) for generating in (2, 16))
    assert few > 3 * many, "with steps that only generate it would"


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    even = learnt()
    for first in range(0, 65536, 1024):
        slow = step(first, first + 1024)
        even.add(StepTook(slow.tokens, slow.attended, 3 * slow.seconds), 0)
    assert seconds_of(even, 0, 65536) == pytest.approx(3 * step(0, 65536).seconds, rel=0.1)


def test_many_short_prompts_do_not_make_forget_what_a_long_one_took() -> None:
    even = learnt(noise=0.05)
    chance = random.Random(2)
    for _ in range(300):
        even.add(step(0, chance.randint(200, 2000), chance.uniform(-0.05, 0.05)), 0)
    assert seconds_of(even, 0, 100_000) == pytest.approx(step(0, 100_000).seconds, rel=0.2)
    assert even.longest_tokens == 65536


def test_what_is_not_known_is_tried() -> None:
    assert BreakEven().worth(pieces("redis", "redis"), 0, 600, 0) == 2
    assert learnt().worth(pieces("redis", "redis"), 0, 600, 0) == 2


@pytest.mark.parametrize(("rate", "worth"), [(50e9, 8), (2e9, 0)])
def test_a_tier_is_used_where_it_is_faster_than_the_engine(rate: float, worth: int) -> None:
    """A chunk takes 5.2 ms to compute: at 6.4 GB/s it comes as fast."""
    even = learnt()
    even.add(PullTook("nvme", int(rate), 1.0), 0)
    assert even.worth(pieces(*["nvme"] * 8), 0, 8 * CHUNK + 10, 0) == worth


def test_later_chunks_of_a_long_prompt_are_worth_a_slower_tier() -> None:
    """The last of 131,072 tokens attend to all before them: a chunk takes 38 ms there, as much as a tier of 0.87 GB/s."""
    even = learnt()
    even.add(PullTook("redis", 10**9, 1.0), 0)
    short, long = pieces(*["redis"] * 16), pieces(*["redis"] * 512)
    assert even.worth(short, 0, 16 * CHUNK, 0) == 0
    expected = min(range(513), key=lambda count: count * CHUNK_BYTES / 1e9 + step(count * CHUNK, 512 * CHUNK).seconds)
    assert even.worth(long, 0, 512 * CHUNK, 0) == expected


def test_what_lies_in_dram_is_pulled_though_what_follows_is_not() -> None:
    even = learnt()
    even.add(PullTook("dram", 50 * 10**9, 1.0), 0)
    even.add(PullTook("redis", 10**9, 1.0), 0)
    assert even.worth(pieces("dram", "dram", "dram", "redis", "redis"), 0, 5 * CHUNK, 0) == 3


def test_two_tiers_bring_their_parts_side_by_side() -> None:
    even = learnt()
    for tier in ("nvme", "redis"):
        even.add(PullTook(tier, 4 * 10**9, 1.0), 0)  # type: ignore[arg-type]
    assert even.worth(pieces(*["nvme"] * 8), 0, 8 * CHUNK, 0) == 0
    assert even.worth(pieces(*["nvme", "redis"] * 4), 0, 8 * CHUNK, 0) == 8


def test_a_slow_tier_is_tried_again_after_a_while() -> None:
    even = learnt()
    even.add(PullTook("redis", 1000, 1.0), 100)
    assert even.worth(pieces("redis"), 0, 300, 101) == 0
    assert even.worth(pieces("redis"), 0, 300, 100 + FORGOTTEN_AFTER_SECONDS) == 1
    even.add(PullTook("redis", 10**12, 1.0), 200)
    assert even.worth(pieces("redis"), 0, 300, 201) == 1, "what was slow long ago must not count beside what is fast now"
