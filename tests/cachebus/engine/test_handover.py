"""What one engine computes is pulled out of its memory by another one: two processes, a real bus, and everything that can come between."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from handover_engines import Computing, Following
from neighbour_engine import LAYOUT, Shape
from tests_shared import Bus, wait_for

from cachebus.engine.blocks import AlreadyComputed
from cachebus.engine.neighbours import Neighbours
from cachebus.engine.transfer import LoadPiece
from cachebus.holder import Holder
from cachebus.messages_handover import Offer, OfferedEntry, SharedMemory

SHAPE = Shape()
THERE = [[1, 2], [3, 4], [7, 5]]
HERE = [[10, 3], [0, 9], [15, 6]]


class Both:
    """Engines of one shape, ended with the test."""

    def __init__(self, bus: Bus, shape: Shape) -> None:
        self._bus, self.shape, self.source = bus, shape, shape.filled(1)
        self.started: list[Computing] = []
        self.followers: list[Following] = []

    def computing(self) -> Computing:
        self.started.append(Computing(self._bus, self.shape))
        return self.started[-1]

    def following(self, *, verify: bool = True) -> Following:
        self.followers.append(Following(self._bus, self.shape, verify=verify))
        return self.followers[-1]

    def arrived(self, follower: Following, there: Sequence[Sequence[int]] = THERE, here: Sequence[Sequence[int]] = HERE) -> bool:
        return follower.has(self.source, there, here)


@pytest.fixture
def bus_dir(dir_in_memory: Path) -> Path:
    return dir_in_memory


@pytest.fixture
def keys() -> list[bytes]:
    return [secrets.token_bytes(32) for _ in THERE]


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def both(bus: Bus, request: pytest.FixtureRequest) -> Iterator[Both]:
    engines = Both(bus, Shape(request.param))
    yield engines
    for engine in engines.started:
        engine.kill()
    for follower in engines.followers:
        follower.stop()
    wait_for(lambda: not any(bus.daemon.statistics()[name] for name in ("leases", "waiters")))


def test_a_follower_has_the_bytes_before_the_region_has(bus: Bus, keys: list[bytes], both: Both) -> None:
    engine, follower = both.computing(), both.following()
    follower.follow(keys, HERE)
    wait_for(lambda: bus.daemon.statistics()["waiters"] == 1)
    engine.publish(keys, THERE)
    assert follower.ended() == set()
    assert both.arrived(follower)
    assert bus.daemon.statistics()["chunks"] == 0
    assert (follower.mover.counts["handed_chunks"], follower.mover.counts["handed_bytes"]) == (3, 3 * 2 * both.shape.layers * both.shape.page)
    assert follower.mover.counts["pulled_chunks"] == 0
    engine.tell(open=True)
    wait_for(lambda: bus.daemon.statistics()["chunks"] == 3)
    follower.memory["layer 0"].zero_()
    other = both.following()
    other.follow(keys, HERE)
    assert other.ended() == set()
    assert both.arrived(other), "what was digested for the offer is what the region has"


@pytest.mark.parametrize("verify", [True, False], ids=["checked", "the control: unchecked"])
def test_a_block_that_was_reused_comes_from_the_region(bus: Bus, keys: list[bytes], both: Both, verify: bool) -> None:
    engine, follower = both.computing(), both.following(verify=verify)
    engine.tell(open=True)
    engine.publish(keys, THERE)
    wait_for(lambda: bus.daemon.statistics()["chunks"] == 3)
    engine.tell(write=[4, 77])
    follower.follow(keys, HERE)
    assert follower.ended() == set()
    assert both.arrived(follower) is verify
    assert follower.mover.counts["stale_offers"] == (1 if verify else 0)
    assert follower.mover.counts["pulled_chunks"] == (1 if verify else 0)
    assert follower.mover.counts["integrity_failures"] == 0, "the region's chunk is good"
    assert bus.daemon.statistics()["integrity_failures_total"] == 0
    assert bus.daemon.statistics()["offers_stale_total"] == (1 if verify else 0)
    assert bus.daemon.statistics()["offers"] == (2 if verify else 3), "nobody else is sent there"


def test_a_block_that_was_reused_before_it_was_published_is_computed_again(bus: Bus, keys: list[bytes], both: Both) -> None:
    engine, follower = both.computing(), both.following()
    engine.publish(keys, THERE)
    wait_for(lambda: bus.daemon.statistics()["offers"] == 3)
    engine.tell(write=[3, 1])
    follower.follow(keys, HERE, wait_ms=300)
    assert follower.ended() == set(HERE[1])
    assert follower.mover.counts["handed_chunks"] == 2
    assert both.arrived(follower, [THERE[0], THERE[2]], [HERE[0], HERE[2]])


def test_an_engine_that_is_killed_after_its_offer_harms_nobody(bus: Bus, keys: list[bytes], both: Both) -> None:
    engine, follower = both.computing(), both.following()
    engine.publish(keys[:2], THERE[:2])
    wait_for(lambda: bus.daemon.statistics()["offers"] == 2)
    engine.kill()
    follower.follow(keys, HERE, wait_ms=400)
    assert follower.ended() == {block for blocks in HERE for block in blocks}
    wait_for(lambda: bus.daemon.statistics()["offers"] == 0)
    again = both.computing()
    follower.follow(keys, HERE)
    wait_for(lambda: bus.daemon.statistics()["waiters"] == 1)
    again.publish(keys, THERE)
    assert follower.ended() == set()
    assert both.arrived(follower)
    assert follower.mover.counts["handed_chunks"] == 3, "the next engine's offers are taken"
    wait_for(lambda: len(follower.mover._neighbours._memories) == 1, 5)


def test_who_comes_too_late_for_an_offer_has_it_from_the_region(bus: Bus, keys: list[bytes], both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachebus.offers.OFFERS_MAX", 0)
    engine, follower = both.computing(), both.following()
    engine.tell(open=True)
    engine.publish(keys, THERE)
    wait_for(lambda: bus.daemon.statistics()["chunks"] == 3)
    follower.follow(keys, HERE)
    assert follower.ended() == set()
    assert both.arrived(follower)
    assert (follower.mover.counts["handed_chunks"], follower.mover.counts["pulled_chunks"]) == (0, 3)


def test_blocks_that_are_there_are_left_out(bus: Bus, keys: list[bytes], both: Both) -> None:
    engine, follower = both.computing(), both.following()
    engine.tell(open=True)
    engine.publish(keys, THERE)
    follower.follow(keys, [[-1, HERE[0][1]], *HERE[1:]])
    assert follower.ended() == set()
    assert both.arrived(follower, [[2], *THERE[1:]], [[HERE[0][1]], *HERE[1:]])
    assert not any(tensor[HERE[0][0]].any() for tensor in follower.memory.values())
    assert follower.mover.counts["pulled_chunks"] >= 1


def test_memory_that_can_not_be_read_is_not_asked_for_again(bus: Bus, keys: list[bytes], both: Both) -> None:
    follower, holder = both.following(), Holder(bus.run_dir)
    own = follower.mover._neighbours.reaches[0]
    nowhere = SharedMemory(b"i" * 16, holder.id, LAYOUT, own, [(b"1", 4096)] * both.shape.layers, both.shape.blocks, both.shape.page, both.shape.page)
    client = bus.client(holder)
    client.connect(3000)
    client.submit(Offer(nowhere, [OfferedEntry(key, b"d" * 32, there) for key, there in zip(keys, THERE, strict=True)], 10_000))
    wait_for(lambda: bus.daemon.statistics()["offers"] == 3)
    follower.follow(keys, HERE, wait_ms=300)
    assert follower.ended() == {block for blocks in HERE for block in blocks}
    assert own not in follower.mover._neighbours.reaches
    client.close()
    holder.close()


@pytest.mark.parametrize(
    ("there", "count", "page"),
    [([1, SHAPE.blocks], SHAPE.blocks, SHAPE.page), ([-1, 2], SHAPE.blocks, SHAPE.page), ([1, 2], SHAPE.blocks, 2 * SHAPE.page)],
    ids=["behind the last", "before the first", "of another size"],
)
def test_blocks_that_an_engine_does_not_have_are_not_read(bus: Bus, both: Both, there: list[int], count: int, page: int) -> None:
    follower = both.following()
    memory = follower.mover._blocks.shared(follower.holder.id, LAYOUT)
    wrong = SharedMemory(memory.id, memory.holder, memory.layout, memory.device, memory.layers, count, page, page)
    neighbours = Neighbours(bus.run_dir, follower.mover._blocks, b"k" * 32, wanted=True)
    neighbours.learn([wrong])
    piece = LoadPiece(b"k" * 32, 0, 2 * both.shape.layers * both.shape.page, b"d" * 32, [0, 1], memory=wrong.id, there=there)
    assert neighbours.fetch([piece], AlreadyComputed()) == [False]
