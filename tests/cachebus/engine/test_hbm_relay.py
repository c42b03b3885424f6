"""From vLLM's own publisher over real sockets to a real bus: order, repeats, losses, and a bus that starts again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from engine_events import CLEARED, packed, removed, stored
from tests_shared import ANSWER_MS, NAMESPACE, Bus, wait_for
from vllm.distributed.kv_events import ZmqEventPublisher

from cachebus.engine.command import events_config
from cachebus.engine.hbm_map import HbmMap
from cachebus.engine.hbm_relay import HbmFollower, HbmRelay
from cachebus.keys import chunk_keys, root_key
from cachebus.messages import Snapshot, SnapshotReply
from cachebus.zeromq_engine import EngineEndpoints, EngineEvents

BLOCK, CHUNK = 16, 256
TOKENS = [number * 7 % 1000 for number in range(8 * CHUNK)]
KEYS = chunk_keys(root_key(NAMESPACE), TOKENS, CHUNK)
NAMES = [f"block {number}".encode() for number in range(len(TOKENS) // BLOCK)]


def part(first: int, last: int) -> dict[str, Any]:
    """The blocks of chunks ``first`` to ``last`` (excluded)."""
    begin, end = first * CHUNK // BLOCK, last * CHUNK // BLOCK
    return stored(NAMES[begin:end], NAMES[begin - 1] if begin else None, TOKENS[first * CHUNK : last * CHUNK], BLOCK)


class Batch(msgspec.Struct, array_like=True):
    """What vLLM's publisher is given."""

    time: float
    events: list[Any]
    data_parallel_rank: int | None = None


class Engine(ZmqEventPublisher):  # type: ignore[misc]
    """vLLM's publisher, which can also lose what it is told to. ``old``: it repeats batches as 0.25.1 does, without a topic."""

    def __init__(self, endpoints: EngineEndpoints, *, old: bool = False) -> None:
        self.old = old
        config = {**events_config(endpoints)}
        del config["enable_kv_cache_events"], config["publisher"]
        super().__init__(0, **config)

    def tell(self, *events: dict[str, Any]) -> None:
        self.publish(Batch(1.0, list(events)))

    def lose(self, *events: dict[str, Any], kept: bool) -> None:
        """A batch that no subscriber gets. ``kept``: it can be repeated."""
        wait_for(lambda: self._event_queue.qsize() == 0 and self._event_queue.unfinished_tasks == 0)
        number = next(self._seq_gen)
        if kept:
            self._buffer.append((number, packed(*events)))

    def _service_replay(self) -> None:
        if not self.old:
            super()._service_replay()
            return
        client, _, first = self._replay.recv_multipart()
        for number, payload in self._buffer:
            if number >= int.from_bytes(first, "big"):
                self._replay.send_multipart((client, b"", number.to_bytes(8, "big"), payload))
        self._replay.send_multipart((client, b"", self.END_SEQ, b""))


class Watched:
    """An engine, its supervisor's relay, and what the bus says of it."""

    def __init__(self, bus: Bus, *, old: bool) -> None:
        self.bus = bus
        self.endpoints = EngineEndpoints.make(bus.run_dir)
        self.engine = Engine(self.endpoints, old=old)
        bus.register("w", "decode", "http://w")
        self.relay = HbmRelay(bus.run_dir, "w", bus.holder, lambda: EngineEvents(self.endpoints))

    def known(self) -> set[bytes] | None:
        client = self.bus.client()
        reply = client.call(Snapshot(), ANSWER_MS)
        client.close()
        assert isinstance(reply, SnapshotReply)
        keys = reply.hbm.get("w")
        return None if keys is None else set(keys)

    def knows(self, *keys: bytes) -> None:
        wait_for(lambda: self.known() == set(keys), 5)


@pytest.fixture(params=["0.25.1", "0.32.0"])
def watched(bus: Bus, request: pytest.FixtureRequest) -> Iterator[Watched]:
    watched = Watched(bus, old=request.param == "0.25.1")
    yield watched
    if watched.relay.is_alive():
        watched.relay.stop()
        assert not watched.relay.is_alive()
    watched.engine.shutdown()
    watched.endpoints.remove()


def test_what_was_told_before_anybody_listened_is_known_too(watched: Watched) -> None:
    watched.engine.tell(part(0, 2))
    watched.relay.start()
    watched.knows(*KEYS[:2])
    watched.engine.tell(part(2, 8), removed([NAMES[3 * CHUNK // BLOCK]]))
    watched.knows(*KEYS[:3])
    watched.engine.tell(CLEARED)
    watched.knows()
    assert watched.bus.daemon.statistics()["hbm_gaps_total"] == 0


def test_what_is_missing_is_repeated(watched: Watched) -> None:
    watched.relay.start()
    watched.engine.tell(part(0, 1))
    watched.knows(KEYS[0])
    watched.engine.lose(part(1, 2), kept=True)
    watched.engine.tell(part(2, 3))
    watched.knows(*KEYS[:3])
    assert watched.bus.daemon.statistics()["hbm_gaps_total"] == 0


def test_what_is_lost_makes_the_worker_cold_until_it_is_told_anew(watched: Watched) -> None:
    watched.relay.start()
    watched.engine.tell(part(0, 4))
    watched.knows(*KEYS[:4])
    watched.engine.lose(removed(NAMES), kept=False)
    watched.engine.tell(part(4, 5))
    watched.knows()
    assert watched.bus.daemon.statistics()["hbm_gaps_total"] == 1
    watched.engine.tell(part(0, 1))
    watched.knows(KEYS[0])


def test_a_batch_that_means_nothing_is_a_loss(watched: Watched) -> None:
    watched.relay.start()
    watched.engine.tell(part(0, 4))
    watched.knows(*KEYS[:4])
    watched.engine.tell(stored(NAMES[:3], None, [1], BLOCK))
    watched.knows()
    watched.engine.tell(part(0, 2))
    watched.knows(*KEYS[:2])
    assert watched.bus.daemon.statistics()["hbm_gaps_total"] == 1


def test_a_bus_that_starts_again_is_told_all(watched: Watched) -> None:
    watched.relay.start()
    watched.engine.tell(part(0, 3))
    watched.knows(*KEYS[:3])
    watched.bus.stop()
    watched.engine.tell(part(3, 5))
    watched.bus.start()
    assert watched.known() is None, "it knows nothing of a worker that is not there yet"
    watched.bus.register("w", "decode", "http://w")
    watched.knows(*KEYS[:5])


def test_a_prompt_of_512_chunks_is_one_message(watched: Watched) -> None:
    watched.relay.start()
    watched.knows()
    before = watched.bus.daemon.statistics()["events"]
    tokens = list(range(512 * CHUNK))
    watched.engine.tell(stored([number.to_bytes(32, "big") for number in range(len(tokens) // BLOCK)], None, tokens, BLOCK))
    watched.knows(*chunk_keys(root_key(NAMESPACE), tokens, CHUNK))
    assert watched.bus.daemon.statistics()["events"] == before + 1


def test_the_follower_takes_every_batch_once_and_in_order() -> None:
    follower = HbmFollower(HbmMap(NAMESPACE, BLOCK, CHUNK))
    kept = [(number, packed(part(number, number + 1))) for number in range(4)]
    asked = []

    def replay(first: int) -> list[tuple[int, bytes]]:
        asked.append(first)
        return kept

    follower.take(2, kept[2][1], replay)
    assert (asked, follower.next, follower.hbm.chunks) == ([0], 4, set(KEYS[:4])), "a replay may bring more than was missing"
    for number in (2, 3, 0):
        follower.take(number, packed(removed(NAMES)), replay)
    assert (asked, follower.gaps, follower.hbm.chunks) == ([0], 0, set(KEYS[:4])), "what is known already is passed over"
    follower.take(6, packed(part(0, 1)), replay)
    assert (asked, follower.next, follower.gaps, follower.hbm.chunks) == ([0, 4], 7, 1, {KEYS[0]})
