"""Blocks of prompts that were computed for another engine: kept until nobody reads them, and never too long or too many."""

from __future__ import annotations

from dataclasses import replace

from engine_driver import CHUNK, POLICY, Engine

from cachebus.engine.transfer import TransferParams
from cachebus.keys import rank_key
from cachebus.messages import Acquire, Done
from cachebus.messages_handover import Hold

HOLDING = replace(POLICY, hold_ms=400, hold_blocks_max=20)
PROMPT = 3 * CHUNK + 20
BLOCKS = range(14)


def computed(engine: Engine) -> None:
    """The prompt is computed in two steps; its first token is sampled."""
    engine.bus.grant(0)
    engine.half.matched("r", 0, 0, 1 << 20)
    engine.half.allocated("r", list(BLOCKS[:8]), 0)
    engine.step(BLOCKS[:8], 0, 2 * CHUNK, restarted=True)
    engine.step(BLOCKS[8:], 2 * CHUNK, PROMPT - 2 * CHUNK)
    engine.tokens.append(7)


def holds(engine: Engine) -> list[Hold]:
    return [body for body in engine.bus.sent if isinstance(body, Hold)]


def let_go(engine: Engine, now_ms: float) -> list[str]:
    engine.half.step([], ())
    return engine.half.holds.over(now_ms)


def answer(engine: Engine) -> None:
    engine.bus.replies.append((engine.bus.sent.index(holds(engine)[-1]) + 1, Done()))


def test_what_was_computed_is_kept_until_the_daemon_says_that_nobody_needs_it() -> None:
    engine = Engine(PROMPT, HOLDING, transfer=TransferParams("id", "prefill"))
    computed(engine)
    asked = engine.bus.of(Acquire)[0]
    assert isinstance(asked, Acquire)
    assert engine.half.finished("r", whole=True)
    (hold,) = holds(engine)
    assert (hold.holder, hold.keys, hold.wait_ms) == ("holder", asked.keys, 400)
    assert let_go(engine, 1000) == []
    answer(engine)
    assert let_go(engine, 1001) == ["r"]
    assert let_go(engine, 1002) == [], "vLLM's engine ends where a request is named twice"


def test_a_silent_daemon_is_not_waited_for_longer() -> None:
    engine = Engine(PROMPT, HOLDING)
    computed(engine)
    assert engine.half.finished("r", whole=True)
    assert let_go(engine, 5000) == []
    assert let_go(engine, 5399) == []
    assert let_go(engine, 5400) == ["r"]
    answer(engine)
    assert let_go(engine, 5401) == [], "its answer comes late"


def test_every_ranks_part_is_asked_for() -> None:
    engine = Engine(PROMPT, replace(HOLDING, holders=["one", "two"]))
    engine.bus.grant(0, of_last=1)
    engine.bus.grant(0, of_last=2)
    engine.half.matched("r", 0, 0, 1 << 20)
    engine.half.allocated("r", list(BLOCKS), 0)
    engine.step(BLOCKS, 0, PROMPT, restarted=True)
    assert engine.half.finished("r", whole=True)
    (hold,) = holds(engine)
    assert len(hold.keys) == 2 * 5
    assert {rank_key(key, 1) for key in hold.keys} & set(hold.keys), "of the same chunks"


def test_nothing_is_kept_of_who_was_aborted_generates_saved_nothing_or_is_being_loaded() -> None:
    aborted = Engine(PROMPT, HOLDING)
    computed(aborted)
    assert not aborted.half.finished("r")

    generating = Engine(PROMPT, HOLDING)
    computed(generating)
    generating.tokens.append(8)
    assert not generating.half.finished("r", whole=True)

    hit = Engine(PROMPT, HOLDING)
    hit.bus.grant(0)
    hit.half.matched("r", PROMPT - 1, 0, 1 << 20)
    hit.half.allocated("r", list(BLOCKS), 0)
    assert not hit.half.finished("r", whole=True)

    loading = Engine(PROMPT, HOLDING, transfer=TransferParams("id", "decode", follow_ms=500))
    loading.half.matched("r", 0, 0, 1 << 20)
    loading.half.allocated("r", list(BLOCKS), PROMPT)
    loading.half.step([], ())
    assert not loading.half.finished("r", whole=True), "its load still writes the blocks, and says itself when it has ended"

    preempted = Engine(PROMPT, HOLDING)
    computed(preempted)
    preempted.half.step([], ["r"])
    assert not preempted.half.finished("r", whole=True), "its blocks are another's"
    assert not any(holds(engine) for engine in (aborted, generating, hit, loading, preempted))


def test_no_more_blocks_are_kept_than_may_be_and_none_without_the_setting() -> None:
    for policy in (POLICY, replace(HOLDING, hold_blocks_max=13)):
        engine = Engine(PROMPT, policy)
        computed(engine)
        assert not engine.half.finished("r", whole=True)
        assert not holds(engine)
    engine = Engine(PROMPT, HOLDING)
    computed(engine)
    assert engine.half.finished("r", whole=True)
    assert engine.half.holds.blocks == 14
    assert not engine.half.holds.begin("another", [b"k" * 32], 7)
    assert engine.half.holds.begin("a third", [b"k" * 32], 6)
