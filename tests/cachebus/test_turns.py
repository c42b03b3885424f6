"""A wipe and the writes of its key keep their order, whatever the threads do in between."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from redis_server import RedisServer
from test_redis import chunk, remote
from tests_shared import DIGEST_KEY, wait_for

from cachebus.chunk import ChunkHeader, Taken, key_id
from cachebus.effects import Outcome, Probe, Read, Wipe, Write
from cachebus.lanes import Memory
from cachebus.redis import Remote, RemoteSettings
from cachebus.remote_lane import RemoteLane
from cachebus.turns import Turns

LENGTH = 8 << 20


class Slow(Remote):
    """The real tier, in which forgetting stops after the header and goes on when it is told to, as a thread that loses the processor does."""

    begun = threading.Event()
    may_go_on = threading.Event()

    def delete(self, keys: Sequence[bytes]) -> int:
        found = self.probe(keys)
        self.begun.set()
        assert self.may_go_on.wait(10)
        return super().delete(keys) + found.count(None)


class Gated(Remote):
    """The real tier, in which every read waits for a permit."""

    def __init__(self, settings: RemoteSettings) -> None:
        super().__init__(settings)
        self.begun = threading.Event()
        self.permits = threading.Semaphore(0)

    def get(self, header: ChunkHeader, into: memoryview, taken: Taken = lambda piece: None) -> ChunkHeader | None:
        self.begun.set()
        assert self.permits.acquire(timeout=10)
        return super().get(header, into, taken)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    made = RedisServer(tmp_path)
    yield made
    made.stop()


def test_a_chunk_that_is_written_again_while_it_is_wiped_is_there(server: RedisServer) -> None:
    header, payload = chunk(1, LENGTH)
    other, _ = chunk(2, LENGTH)
    tier = Slow(RemoteSettings(server.url, key_id(DIGEST_KEY), 60, 2000))
    lane = RemoteLane(tier, Memory(memoryview(bytearray(payload)), DIGEST_KEY), readers=1, writers=3, wake=lambda: None)
    try:
        wait_for(lambda: lane.usable)
        lane.start(Wipe("redis", keys=[header.key]))
        assert tier.begun.wait(10)
        lane.start(Write(1, "redis", header, 0, 0, None))
        lane.start(Write(2, "redis", ChunkHeader(other.key, other.layout, other.digest, LENGTH, other.key_id), 0, 0, None))
        done: dict[int, Outcome] = {}
        wait_for(lambda: done.update(lane.outcomes()) or 2 in done)
        assert not server.client.exists(tier._name(header.key)), "it waits, and holds up no other"
        tier.may_go_on.set()
        wait_for(lambda: done.update(lane.outcomes()) or len(done) == 2)
        assert all(outcome.good for outcome in done.values())
        into = bytearray(LENGTH)
        assert tier.get(header, memoryview(into)) == header
        assert into == payload
    finally:
        tier.may_go_on.set()
        lane.close(5)


@pytest.mark.parametrize("keys", [[b"a" * 32], []], ids=["a key", "everything"])
def test_a_wipe_waits_for_a_write_that_is_under_way_and_holds_up_the_next(keys: list[bytes]) -> None:
    turns, order = Turns(), []
    header = ChunkHeader(b"a" * 32, b"l" * 16, b"d" * 32, 1, b"k" * 8)
    first, wipe, second = Write(1, "redis", header, 0, 0, None), Wipe("redis", keys=keys), Write(2, "redis", header, 0, 0, None)
    foreign = Write(3, "redis", ChunkHeader(b"b" * 32, b"l" * 16, b"d" * 32, 1, b"k" * 8), 0, 0, None)

    def wiped() -> None:
        with turns.wiping(wipe):
            order.append("wipe")

    def written() -> None:
        with turns.writing(second):
            order.append("second")

    threads = [threading.Thread(target=written), threading.Thread(target=wiped)]
    turns.asked(first)
    with turns.writing(first):
        for job in (wipe, second, foreign):
            turns.asked(job)
        for thread in threads:
            thread.start()
        threads[1].join(0.1)
        if keys:
            with turns.writing(foreign):
                order.append("foreign")
        order.append("first")
    for thread in threads:
        thread.join(10)
    assert order == [*(["foreign"] if keys else []), "first", "wipe", "second"]


class Counting(Remote):
    """The real tier, which waits before its first write and notes how many chunks it is given at once."""

    def __init__(self, settings: RemoteSettings) -> None:
        super().__init__(settings)
        self.may_write = threading.Event()
        self.together: list[int] = []

    def put_all(self, chunks: Sequence[tuple[ChunkHeader, memoryview]]) -> list[bool]:
        self.together.append(len(chunks))
        assert self.may_write.wait(10)
        return super().put_all(chunks)


def test_writes_that_wait_go_together_up_to_a_limit_and_up_to_a_wipe(server: RedisServer) -> None:
    tier = Counting(RemoteSettings(server.url, key_id(DIGEST_KEY), 60, 2000))
    payload = chunk(1, LENGTH)[1]
    lane = RemoteLane(tier, Memory(memoryview(bytearray(payload)), DIGEST_KEY), readers=1, writers=1, wake=lambda: None)
    headers = [ChunkHeader(bytes([n]) * 32, b"l" * 16, chunk(1, LENGTH)[0].digest, LENGTH, key_id(DIGEST_KEY)) for n in range(1, 10)]
    wait_for(lambda: lane.usable)
    for number, header in enumerate(headers[:2], 1):
        lane.start(Write(number, "redis", header, 0, 0, None))
        wait_for(lambda: tier.together)
    lane.start(Wipe("redis", keys=[headers[0].key]))
    for number, header in enumerate(headers[2:], 3):
        lane.start(Write(number, "redis", header, 0, 0, None))
    tier.may_write.set()
    done: dict[int, Outcome] = {}
    wait_for(lambda: done.update(lane.outcomes()) or len(done) == len(headers))
    lane.close(5)
    assert all(outcome.good for outcome in done.values())
    assert tier.together == [1, 4, 4], "the first was alone in the queue; four times 8 MiB are the limit"
    assert tier.probe([header.key for header in headers]) == [None, *headers[1:]]


def test_any_mixture_ends(server: RedisServer) -> None:
    """No order of jobs makes threads wait for each other; at the end what is there is whole."""
    tier = remote(server.url)
    drawn = random.Random(7)
    chunks = [chunk(n, 5000) for n in range(4)]
    lane = RemoteLane(tier, Memory(memoryview(bytearray(chunks[0][1])), DIGEST_KEY), readers=1, writers=3, wake=lambda: None)
    written = 0
    for number in range(1, 600):
        kind = drawn.random()
        header = drawn.choice(chunks)[0]
        if kind < 0.7:
            written += 1
            lane.start(Write(number, "redis", header, 0, 0, None))
        else:
            lane.start(Wipe("redis", keys=[header.key] if kind < 0.95 else []))
    done: list[tuple[int, Outcome]] = []
    wait_for(lambda: done.extend(lane.outcomes()) or len(done) == written, 30)
    lane.close(10)
    assert not any(thread.is_alive() for thread in lane._threads)
    headers = {name for name in server.client.keys("*") if not name.endswith(b":0")}
    assert {name + b":0" for name in headers} <= set(server.client.keys("*")), "no header without its part"


def test_a_probe_overtakes_the_reads_that_wait(server: RedisServer) -> None:
    """A long prompt's first probes begin reads; the lookup must hear of the rest before all those are through."""
    header, payload = chunk(1, LENGTH)
    tier = Gated(RemoteSettings(server.url, key_id(DIGEST_KEY), 60, 2000))
    lane = RemoteLane(tier, Memory(memoryview(bytearray(payload)), DIGEST_KEY), readers=1, writers=1, wake=lambda: None)
    done: dict[int, Outcome] = {}
    try:
        wait_for(lambda: lane.usable)
        assert tier.put(header, memoryview(payload))
        for number in range(1, 6):
            lane.start(Read(number, "redis", header, 0, 0, None))
        assert tier.begun.wait(10)
        lane.start(Probe(6, "redis", [header.key]))
        wait_for(lambda: done.update(lane.outcomes()) or done)
        assert set(done) == {6}
        assert done[6].headers == [header]
    finally:
        tier.permits.release(10)
        lane.close(5)
