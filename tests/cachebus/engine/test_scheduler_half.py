from __future__ import annotations

from dataclasses import replace

from engine_driver import BLOCK, CHUNK, POLICY, ROOT, Engine

from cachebus.engine.break_even import PullTook, StepTook, attended
from cachebus.engine.transfer import SAVING_STEPS_MAX, TransferParams
from cachebus.engine.views import RequestView, Scheduled
from cachebus.keys import chunk_keys, rank_key, tail_keys
from cachebus.messages import Acquire, Extent, Granted, Release, Report, Withdraw
from cachebus.wire import Tier


def test_the_prompts_chunks_and_tail_blocks_are_looked_up() -> None:
    engine = Engine(CHUNK * 2 + BLOCK + 3)
    (acquire,) = engine.bus.of(Acquire)
    keys = chunk_keys(ROOT, engine.tokens, CHUNK)
    assert isinstance(acquire, Acquire)
    assert acquire.keys == keys + tail_keys(keys[-1], engine.tokens[2 * CHUNK :], BLOCK)


def test_an_answer_that_has_not_come_is_asked_for_again_until_the_deadline() -> None:
    engine = Engine(CHUNK * 2)
    assert engine.half.matched("r", 0, 0, 1 << 20) is None
    assert engine.half.matched("r", 0, 249, 1 << 20) is None
    assert engine.half.matched("r", 0, 250, 1 << 20) == 0
    engine.bus.grant(2)
    assert engine.half.matched("r", 0, 251, 1 << 20) == 0
    assert engine.bus.of(Release) == [Release([5])], "a grant that comes too late must not stay leased"


def test_an_answer_that_is_about_to_come_is_waited_for_once() -> None:
    engine = Engine(CHUNK * 2)
    engine.bus.grant(2)
    engine.bus.replies, engine.bus.late = [], engine.bus.replies
    assert engine.half.matched("r", 0, 0, 1 << 20) == 2 * CHUNK
    assert len(engine.bus.waits) == 1


def test_answers_that_stay_away_are_not_waited_for_one_after_the_other() -> None:
    engine = Engine(CHUNK)
    for number in range(20):
        engine.half.add(RequestView(f"r{number}", engine.tokens, CHUNK, "", True, None))
        assert engine.half.matched(f"r{number}", 0, number, 1 << 20) is None
    assert len(engine.bus.waits) == 1
    engine.half.add(RequestView("later", engine.tokens, CHUNK, "", True, None))
    engine.half.matched("later", 0, 200, 1 << 20)
    assert len(engine.bus.waits) == 2


def test_what_is_granted_is_loaded_into_the_blocks_after_the_local_ones() -> None:
    engine = Engine(CHUNK * 2 + BLOCK)
    engine.bus.grant(3)
    assert engine.half.matched("r", BLOCK, 0, 1 << 20) == 2 * CHUNK
    assert engine.half.matched("r", BLOCK, 0, 1 << 20) == 2 * CHUNK, "asking again must change nothing"
    engine.half.allocated("r", list(range(100, 109)), 2 * CHUNK)
    plan = engine.half.step([], ())
    (load,) = plan.loads
    assert (load.request_id, load.lease) == ("r", 5)
    assert [piece.blocks for piece in load.pieces] == [[-1, 101, 102, 103], [104, 105, 106, 107], [108]]
    engine.half.allocated("r", list(range(100, 109)), 0)
    assert engine.half.step([], ()).loads == []
    assert engine.bus.of(Release) == [], "the mover ends the lease of a load"


def test_too_small_a_gain_is_not_pulled_and_its_lease_is_ended() -> None:
    engine = Engine(CHUNK)
    engine.bus.grant(1)
    assert engine.half.matched("r", CHUNK - BLOCK, 0, 1 << 20) == 0
    engine.half.allocated("r", [1, 2, 3, 4], 0)
    assert engine.bus.of(Release) == [Release([5])]


def test_a_load_that_failed_is_not_tried_again() -> None:
    engine = Engine(CHUNK * 2)
    engine.bus.grant(2)
    engine.half.matched("r", 0, 0, 1 << 20)
    engine.half.allocated("r", list(range(8)), 2 * CHUNK)
    engine.half.step([], ())
    assert engine.half.matched("r", 0, 0, 1 << 20) == 0
    assert len(engine.bus.of(Acquire)) == 1


def test_a_preempted_request_is_looked_up_again_with_what_it_generated() -> None:
    engine = Engine(CHUNK + BLOCK)
    engine.bus.grant(0)
    assert engine.half.matched("r", 0, 0, 1 << 20) == 0
    engine.step(range(8), 0, CHUNK + BLOCK)
    engine.tokens += range(900, 900 + 3 * BLOCK)
    engine.step([], CHUNK + BLOCK, 3 * BLOCK)
    engine.half.step([], ["r"])
    assert engine.half.matched("r", 0, 0, 1 << 20) is None
    last = engine.bus.of(Acquire)[-1]
    assert isinstance(last, Acquire)
    assert last.keys == chunk_keys(ROOT, engine.tokens, CHUNK)
    engine.bus.grant(2)
    assert engine.half.matched("r", 0, 0, 1 << 20) == 2 * CHUNK


def test_chunks_are_saved_in_the_step_that_completes_them() -> None:
    engine = Engine(CHUNK * 2 + BLOCK + 1)
    keys = chunk_keys(ROOT, engine.tokens, CHUNK)
    assert engine.step(range(5), 0, CHUNK + 1) == [(keys[0], [0, 1, 2, 3], False)]
    assert engine.step(range(5, 10), CHUNK + 1, CHUNK - 2) == []
    tail = tail_keys(keys[1], engine.tokens[2 * CHUNK :], BLOCK)
    assert engine.step([], 2 * CHUNK - 1, BLOCK + 2) == [(keys[1], [4, 5, 6, 7], False), (tail[0], [8], True), (tail[1], [9], True)]
    assert engine.step([], 2 * CHUNK + BLOCK + 1, 1) == []


def test_a_prompts_last_block_is_pulled_and_saved_though_it_is_not_full() -> None:
    engine = Engine(CHUNK + BLOCK + 3)
    engine.bus.grant(3)
    assert engine.half.matched("r", 0, 0, 1 << 20) == CHUNK + BLOCK + 3
    engine.half.allocated("r", list(range(10, 16)), CHUNK + BLOCK + 3)
    plan = engine.plan(range(10, 16), CHUNK + BLOCK + 2, 1, restarted=True)
    assert [piece.blocks for piece in plan.loads[0].pieces] == [[10, 11, 12, 13], [14], [15]]
    assert plan.saves == []
    assert engine.bus.of(Report) == [Report("id", "decode", "decode-0", CHUNK + BLOCK + 3, 0, {"dram": CHUNK + BLOCK + 2})]

    shorter, longer = Engine(CHUNK + BLOCK + 2), Engine(CHUNK + BLOCK + 4)
    wanted = [set(acquire.keys) for other in (engine, shorter, longer) for acquire in other.bus.of(Acquire) if isinstance(acquire, Acquire)]
    assert len(set.intersection(*wanted)) == 2, "a block that is not full serves only the prompt that ends in it"


def test_a_step_that_writes_blocks_which_are_being_saved_is_fenced() -> None:
    engine = Engine(CHUNK + 3)
    assert (engine.plan(range(5), 0, CHUNK + 3).number, engine.half.step([], ()).number) == (1, 0)
    engine.tokens.append(7)
    plan = engine.plan([], CHUNK + 3, 1)
    assert (plan.fence, plan.tail_fence) == (0, 1), "the next token goes into the prompt's last block"

    other = Engine(CHUNK * 2)
    other.plan(range(8), 0, CHUNK)
    second = other.plan([], CHUNK, CHUNK)
    assert (second.number, second.fence) == (2, 0)
    assert not other.half.step([Scheduled("unknown", [9], False, 0, 3)], ()).fence
    assert other.half.step([Scheduled("unknown", [1], False, 0, 3)], ()).fence == 1, "a step before the last may still be under way"
    assert other.half.step([Scheduled("unknown", [1, 4], False, 0, 6)], ()).fence == 2, "a block was given to another request"


def test_no_more_saves_are_remembered_than_can_be_under_way() -> None:
    engine = Engine(CHUNK * (SAVING_STEPS_MAX + 1))
    for step in range(SAVING_STEPS_MAX):
        engine.plan(range(4 * step, 4 * step + 4), CHUNK * step, CHUNK)
    assert engine.half.step([Scheduled("unknown", [0], False, 0, 3)], ()).fence == 1
    engine.plan(range(100, 104), CHUNK * SAVING_STEPS_MAX, CHUNK)
    assert not engine.half.step([Scheduled("unknown", [0], False, 0, 3)], ()).fence


def test_a_load_into_blocks_which_are_being_saved_is_fenced() -> None:
    engine = Engine(CHUNK)
    engine.plan(range(4), 0, CHUNK)
    engine.half.finished("r")
    engine.half.add(RequestView("r", engine.tokens, CHUNK, "", True, None))
    engine.bus.grant(1)
    assert engine.half.matched("r", 0, 0, 1 << 20) == CHUNK
    engine.half.allocated("r", [3, 2, 1, 0], CHUNK)
    assert engine.half.step([], ()).fence


def test_what_the_store_has_is_not_saved_again() -> None:
    engine = Engine(CHUNK * 2 + BLOCK)
    engine.bus.grant(2)
    engine.half.matched("r", 0, 0, 1 << 20)
    engine.half.allocated("r", list(range(9)), 2 * CHUNK)
    saves = engine.step(range(9), 2 * CHUNK, BLOCK, restarted=True)
    assert [(blocks, tail) for _, blocks, tail in saves] == [([8], True)]


def test_generated_tokens_are_saved_when_their_ids_are_known_and_only_if_wanted() -> None:
    for wanted in (True, False):
        engine = Engine(CHUNK - 1, replace(POLICY, save_decode_cache=wanted))
        engine.step(range(4), 0, CHUNK - 1)
        # The engine computes the first generated token's KV; with asynchronous scheduling its id may not be known yet.
        assert engine.step([], CHUNK - 1, 1) == []
        engine.tokens += [7, 8]
        saved = [blocks for _, blocks, _ in engine.step([4], CHUNK, 1)]
        assert saved == ([[0, 1, 2, 3]] if wanted else [])


def test_blocks_of_a_restarted_request_replace_the_old_ones() -> None:
    engine = Engine(CHUNK)
    engine.step([1, 2], 0, 2 * BLOCK)
    saves = engine.step([5, 6, 7, 8], 0, CHUNK, restarted=True)
    assert [blocks for _, blocks, _ in saves] == [[5, 6, 7, 8]]


def test_a_report_says_where_the_prompt_came_from_once() -> None:
    engine = Engine(CHUNK * 2 + 1)
    engine.bus.grant(2)
    engine.half.matched("r", BLOCK, 0, 1 << 20)
    engine.half.allocated("r", list(range(9)), 2 * CHUNK - BLOCK)
    engine.step(range(9), 2 * CHUNK, 1, restarted=True)
    engine.step([], 2 * CHUNK + 1, 1)
    assert engine.bus.of(Report) == [Report("id", "decode", "decode-0", 2 * CHUNK + 1, BLOCK, {"dram": 2 * CHUNK - BLOCK})]


def test_a_load_cut_short_is_reported_as_far_as_it_came() -> None:
    engine = Engine(CHUNK * 2 + 1)
    engine.bus.grant(2)
    engine.half.matched("r", 0, 0, 1 << 20)
    engine.half.allocated("r", list(range(9)), 2 * CHUNK)
    engine.step(range(9), CHUNK, CHUNK + 1, restarted=True)
    assert engine.bus.of(Report) == [Report("id", "decode", "decode-0", 2 * CHUNK + 1, 0, {"dram": CHUNK})]


def test_what_a_load_did_not_bring_is_published_again() -> None:
    engine = Engine(CHUNK * 2 + BLOCK)
    keys = chunk_keys(ROOT, engine.tokens, CHUNK)
    engine.bus.grant(3)
    engine.half.matched("r", 0, 0, 1 << 20)
    engine.half.allocated("r", list(range(9)), 2 * CHUNK + BLOCK)
    saves = engine.step(range(9), CHUNK + BLOCK, CHUNK, restarted=True)
    assert [(blocks, tail) for _, blocks, tail in saves] == [([4, 5, 6, 7], False), ([8], True)]
    assert saves[0][0] == keys[1]


def test_a_whole_prompt_that_was_pulled_is_not_published_again() -> None:
    """vLLM computes a prompt's last token itself, so the load seems one token short."""
    engine = Engine(CHUNK * 2)
    engine.bus.grant(2)
    engine.half.matched("r", 0, 0, 1 << 20)
    engine.half.allocated("r", list(range(8)), 2 * CHUNK)
    assert engine.step(range(8), 2 * CHUNK - 1, 1, restarted=True) == []


def test_a_request_that_may_not_pull_is_not_looked_up_but_published() -> None:
    engine = Engine(CHUNK, may_pull=False, transfer=None)
    assert engine.half.matched("r", 0, 0, 1 << 20) == 0
    assert len(engine.step(range(4), 0, CHUNK)) == 1
    assert engine.bus.sent == []


def test_a_request_that_ends_lets_go_of_what_it_has_or_will_get() -> None:
    granted = Engine(CHUNK * 2)
    granted.bus.grant(2)
    granted.half.matched("r", 0, 0, 1 << 20)
    granted.half.finished("r")
    assert granted.bus.of(Release) == [Release([5])]
    assert granted.bus.of(Withdraw) == []

    asked = Engine(CHUNK * 2)
    asked.half.finished("r")
    assert asked.bus.of(Withdraw) == [Withdraw(1)], "an idle engine may not read the grant for long"
    asked.bus.grant(2)
    asked.half.step([], ())
    assert asked.bus.of(Release) == [Release([5])]
    assert asked.half.matched("r", 0, 0, 1 << 20) == 0


def test_salts_part_requests() -> None:
    plain, salted = Engine(CHUNK), Engine(CHUNK, salt="tenant")
    assert plain.bus.of(Acquire) != salted.bus.of(Acquire)


def of_two_ranks(tokens: int = CHUNK * 2) -> Engine:
    return Engine(tokens, replace(POLICY, holders=["first", "second"]))


def test_every_ranks_part_is_looked_up_in_its_name() -> None:
    engine = of_two_ranks()
    first, second = engine.bus.of(Acquire)
    assert isinstance(first, Acquire)
    assert isinstance(second, Acquire)
    assert (first.holder, second.holder) == ("first", "second")
    assert second.keys == [rank_key(key, 1) for key in first.keys]
    assert not set(first.keys) & set(second.keys)


def test_a_chunk_is_there_when_all_ranks_parts_are() -> None:
    engine = of_two_ranks()
    engine.bus.grant(2, lease=7, of_last=2)
    assert engine.half.matched("r", 0, 0, 1 << 20) is None, "one rank's answer is not enough"
    engine.bus.grant(1, lease=8)
    assert engine.half.matched("r", 0, 1, 1 << 20) == CHUNK
    engine.half.allocated("r", list(range(8)), CHUNK)
    plan = engine.half.step([], ())
    assert [(load.rank, load.lease, [piece.blocks for piece in load.pieces]) for load in plan.loads] == [
        (0, 7, [[0, 1, 2, 3]]),
        (1, 8, [[0, 1, 2, 3]]),
    ]
    assert [piece.key for piece in plan.loads[1].pieces] == [rank_key(piece.key, 1) for piece in plan.loads[0].pieces]
    saves = engine.plan(range(8), CHUNK, CHUNK).saves
    assert [save.key for save in saves] == chunk_keys(ROOT, engine.tokens, CHUNK)[1:], "what only one rank has is computed and saved again"


def test_where_one_rank_has_nothing_no_lease_stays() -> None:
    engine = of_two_ranks()
    engine.bus.grant(2, lease=7, of_last=2)
    engine.bus.grant(0)
    assert engine.half.matched("r", 0, 0, 1 << 20) == 0
    assert engine.bus.of(Release) == [Release([7])]


def test_a_request_that_ends_between_two_ranks_answers_leaves_nothing_behind() -> None:
    engine = of_two_ranks()
    engine.bus.grant(2, lease=7, of_last=2)
    assert engine.half.matched("r", 0, 0, 1 << 20) is None
    engine.half.finished("r")
    assert engine.bus.of(Withdraw) == [Withdraw(2)]
    assert engine.bus.of(Release) == [Release([7])]


def test_an_answer_that_one_rank_owes_past_the_deadline_is_a_miss() -> None:
    engine = of_two_ranks()
    engine.bus.grant(2, lease=7, of_last=2)
    assert engine.half.matched("r", 0, 0, 1 << 20) is None
    assert engine.half.matched("r", 0, 250, 1 << 20) == 0
    engine.half.allocated("r", list(range(8)), 0)
    engine.plan(range(8), 0, CHUNK)
    assert engine.bus.of(Release) == [Release([7])]


def test_what_is_sooner_computed_is_not_pulled() -> None:
    engine = Engine(CHUNK * 3)
    engine.half.took([StepTook(CHUNK, 0, 0.001), PullTook("redis", 4096, 1.0)], 0)
    ticket, request = next((n, b) for n, b in enumerate(engine.bus.sent, 1) if isinstance(b, Acquire))
    tiers: list[tuple[bool, Tier]] = [(True, "redis"), (False, "redis"), (False, "redis")]
    extents = [
        Extent(key, place * 4096, 4096, b"d" * 32, ready=ready, source=source)
        for place, (key, (ready, source)) in enumerate(zip(request.keys, tiers, strict=True))
    ]
    engine.bus.replies.append((ticket, Granted(5, extents)))
    assert engine.half.matched("r", 0, 1, 1 << 20) == CHUNK, "what came up already lies in DRAM, wherever it was"
    engine.half.allocated("r", list(range(12)), CHUNK)
    (load,) = engine.half.step([], ()).loads
    assert [piece.blocks for piece in load.pieces] == [[0, 1, 2, 3]]
    assert engine.half.declined_chunks == 2
    assert engine.plan(range(12), CHUNK, 2 * CHUNK).saves == [], "the store has what is computed here"


def test_a_step_says_what_it_computes() -> None:
    engine = Engine(CHUNK * 2)
    engine.plan(range(8), 0, CHUNK)
    plan = engine.plan([], CHUNK, CHUNK)
    assert (plan.tokens, plan.attended) == (CHUNK, attended(CHUNK, 2 * CHUNK))
    generating = engine.plan([], 2 * CHUNK, 1)
    assert (generating.tokens, generating.attended, generating.idle) == (0, 0.0, False), "it tells nothing of prompts"


def test_what_must_not_be_stored_is_pulled_and_never_saved() -> None:
    engine = Engine(CHUNK * 3, transfer=TransferParams("id", "decode", store=False))
    engine.bus.grant(1)
    assert engine.half.matched("r", 0, 0, 1 << 20) == CHUNK
    engine.half.allocated("r", list(range(12)), CHUNK)
    assert engine.step(range(12), CHUNK, 2 * CHUNK) == []
    engine.tokens += range(CHUNK)
    assert engine.step(range(12, 16), 3 * CHUNK, CHUNK) == []
    assert len(engine.bus.of(Report)) == 1
