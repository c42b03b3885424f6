"""A prompt that one engine computes while another one follows it: plain vLLM's tokens, whatever becomes of the first."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from offline_node import OfflineNode
from tests_shared import wait_for

from deploy.bench.load import Load, Piece, Request

SECONDS_MAX = 120.0
PART_MS = 15_000
"""A step on a busy machine takes a while."""


def run(node: OfflineNode, lengths: Sequence[int], answer: int, abort_seconds: float) -> None:
    """Fails where a token differs, where what was computed once is computed again, or where a lease stays.

    ``abort_seconds``: how long after its start a prompt of the longest length is computed by half, more or less.
    """
    prompts = [[Piece(40 + number, length)] for number, length in enumerate([*lengths, *lengths, lengths[-1], lengths[-1]])]
    plain = node.streaming("plain", connected=False)
    expected = [one.ids for one in plain.answers([Request(pieces, answer) for pieces in prompts], SECONDS_MAX, clients=1)]
    plain.stop()
    assert len(set(map(tuple, expected))) == len(expected), "prompts that are answered alike would prove nothing"

    computing, answering = node.streaming("computing"), node.streaming("answering")
    whole: set[int] = set()
    with ThreadPoolExecutor(1) as aside:
        for pieces, tokens in zip(prompts[:-2], expected, strict=False):
            first = aside.submit(computing.answers, [Request(pieces, 1)], SECONDS_MAX)
            (served,) = answering.answers([Request(pieces, answer, follow_ms=PART_MS)], SECONDS_MAX)
            assert served.ids == tokens
            if served.cached >= served.prompt - 1:
                whole.add(served.prompt)
            first.result()
        # An engine that is not given room for a step's chunks in time does not publish them, so on a busy machine one of two may have a hole.
        assert whole == set(lengths)

        first = aside.submit(computing.run, Load([Request(prompts[-2], 1)], abort_seconds))
        (served,) = answering.answers([Request(prompts[-2], answer, follow_ms=1000)], SECONDS_MAX)
        assert not first.result()[0].finished, "it was to be aborted"
        assert served.ids == expected[-2]
        (served,) = answering.answers([Request(prompts[-1], answer, follow_ms=300)], SECONDS_MAX)
        assert served.ids == expected[-1]
        assert not served.cached
    wait_for(lambda: not any(node.statistics()[name] for name in ("leases", "writing", "waiters", "holds")), seconds=10)
    counted = node.statistics()
    assert counted["integrity_failures_total"] == 0
    # Each prompt is read out of the other engine's blocks, as far as these are not wanted for something else.
    wanted = len(whole) if node.settings.cache.handover == "hbm" else 0
    assert (counted["offers_granted_total"] - counted["offers_stale_total"] > wanted) is bool(wanted)
    for engine in (computing, answering):
        # Nothing is held any more, or vLLM would refuse.
        engine.empty_hbm()
    computing.stop()
    answering.stop()


def run_killed(node: OfflineNode, length: int, answer: int) -> None:
    """Fails where an engine that is killed while another one reads its blocks harms that one, or the next in its own place."""
    prompts = [[Piece(60 + number, length)] for number in range(2)]
    plain = node.streaming("plain", connected=False)
    expected = [one.ids for one in plain.answers([Request(pieces, answer) for pieces in prompts], SECONDS_MAX, clients=1)]
    plain.stop()
    computing, answering = node.streaming("computing"), node.streaming("answering")
    with ThreadPoolExecutor(2) as aside:
        following = aside.submit(answering.answers, [Request(prompts[0], answer, follow_ms=PART_MS)], SECONDS_MAX)
        aside.submit(computing.run, Load([Request(prompts[0], 1)], SECONDS_MAX))
        wait_for(lambda: node.statistics()["offers_granted_total"] > 0, seconds=60)
        computing.stop()
        offered = node.statistics()["offers_granted_total"]
        assert offered < length // node.settings.cache.chunk_size, "it was killed too late to leave anything"
        (served,) = following.result()
        assert served.ids == expected[0]
        again = node.streaming("again")
        first = aside.submit(again.answers, [Request(prompts[1], 1)], SECONDS_MAX)
        (served,) = answering.answers([Request(prompts[1], answer, follow_ms=PART_MS)], SECONDS_MAX)
        assert served.ids == expected[1]
        first.result()
    wait_for(lambda: not any(node.statistics()[name] for name in ("leases", "waiters", "holds")), seconds=10)
    again.stop()
    answering.stop()
