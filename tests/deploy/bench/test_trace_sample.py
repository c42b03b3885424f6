"""A trace is made smaller without losing what its conversations reuse, and turned into requests."""

from __future__ import annotations

from deploy.bench import trace_hits, trace_sample
from deploy.bench.load import Request, Served, token_ids
from deploy.bench.trace import Arrival
from deploy.bench.trace_sample import Scale

SCALE = Scale(seconds=10, speed=2, share=1.0, block_tokens=64, answer_tokens_max=32)


def arrival(seconds: float, ids: list[int], length: int = 0, answer: int = 100) -> Arrival:
    return Arrival(seconds, length or 512 * len(ids), answer, tuple(ids))


def test_a_stretch_of_time_and_whole_conversations_are_taken() -> None:
    arrivals = [arrival(second, [0, second % 40 + 1, 1000 + second]) for second in range(200)]
    assert [one.at_seconds for one in trace_sample.sample(arrivals, SCALE)] == list(range(20))
    half = Scale(100, 2, 0.5, 64, 32)
    taken = trace_sample.sample(arrivals, half)
    assert 0 < len(taken) < 200
    conversations = {one.blocks[1] for one in taken}
    assert [one for one in arrivals if one.blocks[1] in conversations] == taken
    assert 10 <= len(conversations) <= 30


def test_prompts_share_what_their_blocks_share_and_are_scaled_alike() -> None:
    first = trace_sample.request(arrival(4.0, [0, 7, 8], 512 * 2 + 256, 100), SCALE)
    second = trace_sample.request(arrival(6.0, [0, 7, 9], 512 * 2 + 100, 1000), SCALE)
    ids, others = token_ids(first.pieces), token_ids(second.pieces)
    assert (len(ids), first.answer, first.at) == (64 * 2 + 32, 12, 2.0)
    assert (len(others), second.answer, second.at) == (64 * 2 + 12, 32, 3.0)
    assert ids[:128] == others[:128]
    assert ids[128:140] != others[128:]


def test_ceilings_are_shares_of_the_tokens_of_what_was_answered() -> None:
    arrivals = [arrival(0, [0, 1]), arrival(1, [0, 2]), arrival(2, [0, 1]), arrival(3, [0, 2])]
    counted = [Served(number, 0.0, 128, finished=True) for number in range(4)]
    assert trace_hits.ceilings(arrivals, SCALE, 1000, counted) == {"unlimited": 5 / 8, "optimal": 5 / 8, "lru": 5 / 8}
    assert trace_hits.ceilings(arrivals, SCALE, 64 * 2, counted) == {"unlimited": 5 / 8, "optimal": 4 / 8, "lru": 3 / 8}
    assert trace_hits.ceilings(arrivals, SCALE, 0, counted) == {"unlimited": 5 / 8, "optimal": 0.0, "lru": 0.0}
    # The last one is not in the figures, yet it went through the cache.
    assert trace_hits.ceilings(arrivals, SCALE, 1000, counted[:3])["unlimited"] == 3 / 6


def test_what_the_model_can_not_take_is_left_out() -> None:
    request: Request = trace_sample.request(arrival(0, [0, 1]), SCALE)
    assert trace_hits.fits(request, 0)
    assert trace_hits.fits(request, 128 + 12)
    assert not trace_hits.fits(request, 128 + 11)
