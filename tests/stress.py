"""Requests that are preempted, aborted and robbed of their chunks, and all the same answered as plain vLLM answers them one at a time."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from offline_node import OfflineNode
from tests_shared import wait_for

from deploy.bench.load import Load, Piece, Request, Served

CLIENTS = 8
SECONDS_MAX = 300.0
MANY = 100
"""So often the requests are repeated where they are to last until all are aborted."""


@dataclass(frozen=True)
class Stress:
    """``prefixes``: lengths of what several requests have in common; ``questions``: how many requests there are.

    ``blocks``: of HBM, a few requests' worth. After up to ``abort_seconds`` all that run are aborted.
    """

    prefixes: Sequence[int]
    questions: int
    answer: int
    blocks: int
    abort_seconds: float

    def requests(self) -> list[Request]:
        """The same every time."""
        chance = random.Random(7)
        return [
            Request([Piece(1 + n % len(self.prefixes), self.prefixes[n % len(self.prefixes)]), Piece(100 + n, chance.randint(1, 300))], self.answer)
            for n in range(self.questions)
        ]


def run(node: OfflineNode, stress: Stress) -> None:
    """Fails where a token differs, a request hangs or a lease stays; and where the control, which checks no digest, answers right."""
    requests = stress.requests()
    plain = node.streaming("plain", connected=False)
    expected = [one.ids for one in plain.answers(requests, SECONDS_MAX, clients=1)]
    plain.stop()
    assert len(set(map(tuple, expected))) == len(expected), "prompts that are answered alike would prove nothing"

    engine = node.streaming("stressed", num_gpu_blocks_override=stress.blocks)
    for _ in range(2):
        assert answered(engine.answers(requests, SECONDS_MAX, CLIENTS)) == expected
        engine.empty_hbm()
    # Time runs out in the middle of pulls, of prefills and of answers; whoever was done has the right tokens.
    for number in range(4):
        cut = engine.run(Load(requests * MANY, stress.abort_seconds * (number + 1) / 4, CLIENTS, detail=True))
        assert all(one.ids == expected[one.number % len(requests)][: len(one.ids)] for one in cut)
        assert not all(one.finished for one in cut), "nothing was aborted"
        engine.empty_hbm()

    before = node.statistics()["integrity_failures_total"]
    node.spoil(share=0.5)
    # And more of it while requests pull and publish.
    robber = threading.Timer(stress.abort_seconds / 2, lambda: node.spoil(share=0.3))
    robber.start()
    served = engine.answers(requests, SECONDS_MAX, CLIENTS)
    robber.join()
    assert answered(served) == expected
    engine.empty_hbm()
    assert answered(engine.answers(requests, SECONDS_MAX, CLIENTS)) == expected
    assert node.statistics()["integrity_failures_total"] > before
    wait_for(lambda: not any(node.statistics()[name] for name in ("leases", "writing", "waiters")), seconds=10)
    engine.stop()

    node.spoil()
    blind = node.streaming("blind", verify=False)
    assert answered(blind.answers(requests, SECONDS_MAX, CLIENTS)) != expected, "the control: unchecked, the changed bytes are believed"
    blind.stop()


def answered(served: Sequence[Served]) -> list[list[int]]:
    """Their tokens."""
    return [one.ids for one in served]
