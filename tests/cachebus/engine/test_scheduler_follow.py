"""The scheduler half and prompts that another engine is computing."""

from __future__ import annotations

from dataclasses import replace

from engine_driver import BLOCK, CHUNK, POLICY, Engine

from cachebus.engine.transfer import TransferParams
from cachebus.messages import Acquire, Report

FOLLOWED = TransferParams("id", "decode", follow_ms=700)


def test_what_another_engine_is_computing_is_promised_whole_and_followed() -> None:
    engine = Engine(5 * CHUNK + 20, transfer=FOLLOWED)
    (asked,) = engine.bus.of(Acquire)
    assert isinstance(asked, Acquire)
    assert asked.wait_ms == 0, "the load waits, not the lookup"
    engine.bus.grant(2)
    assert engine.half.matched("r", 0, 0, 1 << 20) == 5 * CHUNK + 20
    engine.half.allocated("r", range(100, 122), 5 * CHUNK + 20)
    (load,) = engine.half.step([], ()).loads
    assert [piece.key for piece in load.pieces] == asked.keys[:2]
    follows = load.follows
    assert follows is not None
    assert (follows.holder, follows.layout, follows.wait_ms) == ("holder", POLICY.layout, 700)
    assert [part.key for part in follows.coming] == asked.keys[2:]
    assert [part.blocks for part in follows.coming] == [
        [108 + i for i in range(4)],
        [112 + i for i in range(4)],
        [116 + i for i in range(4)],
        [120],
        [121],
    ]
    assert engine.step(range(100, 122), 5 * CHUNK + 19, 1) == [], "whoever computes it publishes it"
    (report,) = engine.bus.of(Report)
    assert isinstance(report, Report)
    assert report.pulled == {"dram": 5 * CHUNK + 19}


def test_blocks_that_are_there_already_are_left_out_of_what_is_followed() -> None:
    engine = Engine(3 * CHUNK, transfer=FOLLOWED)
    engine.bus.grant(0)
    assert engine.half.matched("r", CHUNK + BLOCK, 0, 1 << 20) == 2 * CHUNK - BLOCK
    engine.half.allocated("r", range(100, 112), 2 * CHUNK - BLOCK)
    (load,) = engine.half.step([], ()).loads
    assert (load.lease, load.pieces) == (0, [])
    assert load.follows is not None
    assert [part.blocks for part in load.follows.coming] == [[-1, 105, 106, 107], [108, 109, 110, 111]]


def test_what_did_not_come_in_time_is_computed_and_not_followed_again() -> None:
    engine = Engine(4 * CHUNK, transfer=FOLLOWED)
    engine.bus.grant(1)
    assert engine.half.matched("r", 0, 0, 1 << 20) == 4 * CHUNK
    engine.half.allocated("r", range(100, 116), 4 * CHUNK)
    engine.half.step([], ())
    saved = engine.step(range(100, 116), 2 * CHUNK, 2 * CHUNK)
    assert [blocks[0] for _, blocks, _ in saved] == [108, 112], "the store wants what is computed now"
    engine.half.step([], ["r"])
    assert engine.half.matched("r", 0, 0, 1 << 20) is None
    engine.bus.grant(3)
    assert engine.half.matched("r", 0, 1, 1 << 20) == 3 * CHUNK


def test_where_engines_read_each_others_blocks_the_load_asks_for_all_of_it() -> None:
    engine = Engine(2 * CHUNK + 20, replace(POLICY, hold_ms=400, hold_blocks_max=1), transfer=FOLLOWED)
    assert engine.bus.of(Acquire) == []
    assert engine.half.matched("r", CHUNK, 0, 1 << 20) == CHUNK + 20
    engine.half.allocated("r", range(100, 110), CHUNK + 20)
    (load,) = engine.half.step([], ()).loads
    assert (load.lease, load.pieces) == (0, [])
    assert load.follows is not None
    assert [part.blocks for part in load.follows.coming] == [[104 + i for i in range(4)], [108], [109]]
    assert engine.step(range(100, 110), 2 * CHUNK + 19, 1) == []
    (report,) = engine.bus.of(Report)
    assert isinstance(report, Report)
    assert (report.hbm_tokens, report.pulled) == (CHUNK, {"dram": CHUNK + 19})
