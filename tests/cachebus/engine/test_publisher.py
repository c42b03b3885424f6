"""What the engine waits for while its chunks are copied out, over a real daemon."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from tests_shared import LAYOUT, Bus, wait_for

from cachebus.engine.blocks import Blocks, Entry, open_blocks
from cachebus.engine.publisher import Publisher
from cachebus.engine.transfer import SAVING_STEPS_MAX, Save, StepPlan
from cachebus.holder import Holder
from cachebus.region import Region

PAGE = 4096
CHUNK = Save(b"c" * 32, [0, 1], tail=False)
TAIL = Save(b"t" * 32, [2], tail=True)


class Gated:
    """Blocks whose chunks are copied only when told; tails are copied at once."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self.gate = threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._blocks, name)

    def save(self, entries: Sequence[Entry], key: bytes | None) -> list[bytes]:
        if any(len(entry.blocks) == len(CHUNK.blocks) for entry in entries):
            assert self.gate.wait(10)
        return self._blocks.save(entries, key)


@pytest.fixture
def gated(bus: Bus) -> Iterator[tuple[Gated, Publisher]]:
    region = Region.map(bus.run_dir / "region")
    layers = {"layer": torch.arange(8 * PAGE, dtype=torch.int64).to(torch.uint8).view(8, PAGE)}
    blocks = Gated(open_blocks(layers, 8, region.data))
    publisher = Publisher(bus.run_dir, Holder(bus.run_dir), "w", LAYOUT, blocks, region)  # type: ignore[arg-type]
    yield blocks, publisher
    blocks.gate.set()
    publisher.close()


def waits(publisher: Publisher, blocks: Gated, plan: StepPlan) -> bool:
    """Whether the step begins only when the chunks are copied."""
    began = threading.Event()
    thread = threading.Thread(target=lambda: (publisher.begin(plan), began.set()))
    thread.start()
    waited = not began.wait(0.5)
    if waited:
        blocks.gate.set()
    thread.join(10)
    assert began.is_set()
    return waited


@pytest.mark.parametrize(
    ("plan", "waited"),
    [
        (StepPlan(), False),
        (StepPlan(tail_fence=1), False),
        (StepPlan(fence=1), True),
        (StepPlan([], [Save(b"n" * 32, [5], tail=True)], number=2), False),
        (StepPlan([], [Save(b"n" * 32, [5], tail=True)], number=SAVING_STEPS_MAX + 1), True),
    ],
    ids=["other blocks", "blocks of a tail", "blocks of a chunk", "another step saves", "as many steps save as may"],
)
def test_the_engine_waits_only_for_copies_of_what_it_writes(bus: Bus, gated: tuple[Gated, Publisher], plan: StepPlan, waited: bool) -> None:
    blocks, publisher = gated
    publisher.begin(StepPlan([], [CHUNK, TAIL], number=1))
    publisher.finish()
    assert waits(publisher, blocks, plan) is waited
    blocks.gate.set()
    wait_for(lambda: publisher.counts["published_chunks"] == 2, seconds=3)


def test_what_a_late_answer_reserved_is_given_back(bus: Bus, gated: tuple[Gated, Publisher], monkeypatch: pytest.MonkeyPatch) -> None:
    _, publisher = gated
    monkeypatch.setattr("cachebus.engine.publisher.RESERVE_WAIT_MS_MAX", 0)
    publisher.begin(StepPlan([], [TAIL], number=1))
    publisher.finish()
    publisher.begin(StepPlan(fence=1))
    assert publisher.counts["published_chunks"] == 0
    time.sleep(0.3)
    assert bus.daemon.statistics()["writing"] == 0
