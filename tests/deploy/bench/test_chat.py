"""The chat benchmark's conversations."""

from __future__ import annotations

from deploy.bench.chat import Plan

PLAN = Plan(turns=10, turn_tokens=2048, answer_tokens=64, runs=1, pause_seconds=0)


def test_no_message_is_said_twice() -> None:
    seeds = [PLAN.message(conversation, turn).seed for conversation in range(20) for turn in range(PLAN.turns)]
    assert len(set(seeds)) == len(seeds)
    assert PLAN.message(3, 4).tokens == 2048 - 64


def test_a_turn_knows_the_prompt_before_it_but_for_a_part_of_a_chunk() -> None:
    assert PLAN.known_min(0) == 0
    assert PLAN.known_min(1) == 2048 - 64 - 256
    assert PLAN.known_min(9) == 9 * 2048 - 64 - 256
    assert Plan(10, 128, 16, 1, 0).known_min(1) == 0
