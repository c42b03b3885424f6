"""Tenants' shares of the shared tier, on a real server: who has too much loses its own; accounts are true, or become so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis_server import RedisServer
from share_nodes import CAPACITY, NAMES, PAYLOAD, ROOM, SIZE, A, B, calls, counted, header, mend, node, put, there
from tests_shared import DIGEST_KEY, wait_for

from cachebus.chunk import key_id
from cachebus.redis import Remote, RemoteSettings
from cachebus.redis_account import taken_bytes
from cachebus.redis_names import PART_BYTES
from cachebus.redis_shares import ShareSettings


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    made = RedisServer(tmp_path, "--unixsocket", str(tmp_path / "redis.sock"))
    yield made
    made.stop()


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_one_who_overfills_loses_its_own_and_nobody_elses(server: RedisServer, share: float) -> None:
    """On a server that evicts by itself. Without a share, the control, it evicts the others'."""
    base = int(server.client.info("memory")["used_memory"])  # type: ignore[index]
    server.client.config_set("maxmemory", base + CAPACITY)
    server.client.config_set("maxmemory-policy", "allkeys-lru")
    tier = node(server.url, {A: share}, capacity=0)
    others, own = range(100, 115), range(60)
    assert all(put(tier, others, B))
    for number in own:
        assert put(tier, [number]) == [True]
    if share == 1.0:
        assert len(there(tier, others)) < len(others)
        return
    assert there(tier, others) == [*others]
    kept = there(tier, own)
    assert kept == [*own][-len(kept) :], "the oldest went"
    assert len(kept) * taken_bytes(SIZE) <= share * (base + CAPACITY) < (len(kept) + 1) * taken_bytes(SIZE)
    assert set(kept) == counted(server)
    assert server.client.info("stats")["evicted_keys"] == 0  # type: ignore[index]


def test_a_go_makes_room_before_it_and_keeps_its_own_newest(server: RedisServer) -> None:
    tier = node(server.url)
    assert put(tier, range(25)) == [False] * 15 + [True] * 10
    assert there(tier, range(25)) == [*range(15, 25)]
    assert put(tier, range(30, 36)) == [True] * 6
    assert there(tier, range(40)) == [*range(21, 25), *range(30, 36)]
    assert counted(server) == {*range(21, 25), *range(30, 36)}
    assert server.client.dbsize() == 2 * 10 + 1, "no part is left of what was removed"


def test_what_is_larger_than_the_share_is_not_stored(server: RedisServer) -> None:
    tier = node(server.url)
    assert put(tier, range(3)) == [True] * 3
    large = header(9, length=ROOM)
    assert not tier.put(large, memoryview(bytes(ROOM)))
    assert tier.put(replace(large, tenant=B), memoryview(bytes(ROOM))), "the control"
    assert there(tier, range(3)) == [0, 1, 2]


def test_what_is_read_stays_longer(server: RedisServer) -> None:
    tier = node(server.url)
    put(tier, range(10))
    assert tier.get(header(0), memoryview(bytearray(SIZE))) == tier.probe([header(0).key])[0]
    put(tier, range(10, 15))
    assert there(tier, range(20)) == [0, *range(6, 15)]


def test_a_read_that_another_node_does_counts_too(server: RedisServer) -> None:
    writer, reader = node(server.url), node(server.url)
    put(writer, range(10))
    mend(reader)
    assert reader.get(header(0), memoryview(bytearray(SIZE)))
    assert server.client.zrank(NAMES.account(A, "0"), header(0).key + SIZE.to_bytes(8, "big")) == 9
    writer.shares.keep()
    put(writer, range(10, 15))
    assert there(writer, range(20)) == [0, *range(6, 15)]


def test_two_nodes_keep_one_account(server: RedisServer) -> None:
    tiers = [node(server.url), node(server.url)]
    for number in range(0, 60, 2):
        for at, tier in enumerate(tiers):
            assert put(tier, [number + at]) == [True]
        kept = there(tiers[0], range(number + 2))
        assert len(kept) <= 11, "one more than the share: the second had not heard of the first's"
        for tier in tiers:
            tier.shares.keep()
        kept = there(tiers[0], range(number + 2))
        assert len(kept) == min(10, number + 2)
        assert set(kept) == counted(server)
    assert kept == [*range(50, 60)]


def test_what_another_node_removed_is_not_removed_again(server: RedisServer) -> None:
    tier, other = node(server.url), node(server.url)
    put(tier, range(10))
    put(other, range(10, 15))
    assert {header(number).key for number in range(5)} == set(other.shares.keep())
    put(tier, [20])
    assert tier.shares.keep() == [header(number).key for number in (0, 5)], "the first before it knew"
    assert there(tier, range(30)) == [*range(6, 15), 20]


def test_two_nodes_that_write_at_once_come_to_one_share(server: RedisServer) -> None:
    tiers = [node(server.url), node(server.url)]
    ended = threading.Event()

    def write(tier: Remote, first: int) -> None:
        for start in range(first, first + 400, 4):
            put(tier, range(start, start + 4))

    def look_after(tier: Remote) -> None:
        while not ended.wait(0.02):
            tier.shares.keep()

    writers = [threading.Thread(target=write, args=[tier, 1000 * at]) for at, tier in enumerate(tiers)]
    keepers = [threading.Thread(target=look_after, args=[tier]) for tier in tiers]
    for thread in [*keepers, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    ended.set()
    for thread in keepers:
        thread.join()
    for tier in tiers:
        mend(tier)
    for tier in tiers:
        tier.shares.keep()
    kept = there(tiers[0], [*range(400), *range(1000, 1400)])
    assert set(kept) == counted(server)
    assert 8 <= len(kept) <= 10
    assert all(number % 1000 > 399 - 40 for number in kept)


def test_a_new_node_knows_what_was_there(server: RedisServer) -> None:
    put(node(server.url), range(8))
    tier = node(server.url)
    put(tier, range(10, 15))
    assert there(tier, range(20)) == [3, 4, 5, 6, 7, *range(10, 15)]


def test_what_the_server_evicted_is_counted_until_the_next_look(server: RedisServer) -> None:
    tier = node(server.url)
    put(tier, range(10))
    base = int(server.client.info("memory")["used_memory"])  # type: ignore[index]
    server.client.config_set("maxmemory-policy", "allkeys-lru")
    # Its clock for that counts seconds.
    time.sleep(1.1)
    tier.shares.keep()
    server.client.config_set("maxmemory", base - 5 * taken_bytes(SIZE))
    put(tier, range(50, 51), B)
    server.client.config_set("maxmemory", 0)
    left = there(tier, range(10))
    assert len(left) < 8
    assert counted(server) == {*range(10)}, "the control: it is not true any more"
    mend(tier)
    assert counted(server) == set(left)
    put(tier, range(20, 30 - len(left)))
    assert there(tier, range(30)) == [*left, *range(20, 30 - len(left))], "there was room for them"


def test_an_account_that_is_gone_is_made_again(server: RedisServer) -> None:
    tier = node(server.url)
    put(tier, range(10))
    server.client.delete(NAMES.account(A, "0"))
    mend(tier)
    assert counted(server) == {*range(10)}
    put(tier, range(20, 22))
    tier.shares.keep()
    assert len(there(tier, range(30))) == 10
    assert there(tier, [20, 21]) == [20, 21]


def test_what_expired_is_not_counted(server: RedisServer) -> None:
    tier = node(server.url, ttl=1)
    put(tier, range(5))
    wait_for(lambda: not there(tier, range(5)), 5)
    longer = node(server.url)
    put(longer, range(10, 12))
    mend(longer)
    assert counted(server) == {10, 11}
    assert 0 < server.client.ttl(NAMES.account(A, "0")) <= 60, "it goes after its chunks, not before"  # type: ignore[operator]


def test_what_was_stored_uncounted_is_counted_and_the_oldest_goes(server: RedisServer) -> None:
    without = node(server.url, {})
    first = replace(header(3), written_at=1)
    assert without.put(first, PAYLOAD)
    put(without, [number for number in range(14) if number != 3])
    put(without, range(100, 110), B)
    assert not counted(server)
    tier = node(server.url)
    mend(tier)
    removed = tier.shares.keep()
    assert len(removed) == 4
    assert first.key in removed
    assert len(there(tier, range(14))) == 10
    assert there(tier, range(100, 110)) == [*range(100, 110)]
    before = calls(server)["get"]
    mend(tier)
    assert calls(server)["get"] == before, "nobody's headers are read twice"


def test_a_share_that_becomes_smaller_and_larger(server: RedisServer) -> None:
    tier = node(server.url)
    put(tier, range(10))
    tier.shares.share({A: 0.1})
    mend(tier)
    assert len(tier.shares.keep()) == 6
    assert there(tier, range(10)) == [6, 7, 8, 9]
    tier.shares.share({A: 0.5})
    put(tier, range(20, 36))
    assert len(there(tier, range(40))) == 20
    tier.shares.share({})
    put(tier, range(40, 70))
    mend(tier)
    assert not tier.shares.keep()
    assert len(there(tier, range(70))) == 50


def test_a_share_of_all_goes_for_everybody(server: RedisServer) -> None:
    settings = ShareSettings(0.25, CAPACITY, 60)
    tier = Remote(RemoteSettings(server.url, key_id(DIGEST_KEY), 60, 2000, settings))
    tier.tick()
    tier.shares.share({A: 0.1, B: 0.9})
    for number in range(20):
        put(tier, [number], A)
        put(tier, [100 + number], B)
        put(tier, [200 + number], bytes(8))
    assert [len(there(tier, range(first, first + 20))) for first in (0, 100, 200)] == [4, 10, 10]


def test_an_account_is_no_chunk(server: RedisServer) -> None:
    tier = node(server.url)
    put(tier, range(3))
    assert sorted(tier.scan()) == [header(number).key for number in range(3)]
    assert tier.clear() == 7, "three headers, three parts, the account"
    assert server.client.dbsize() == 0
    assert put(tier, range(3, 13)) == [True] * 10
    assert tier.shares.keep() == [], "nothing that was cleared counts"
    put(tier, range(20, 22), B)
    tier.shares.forget(A)
    assert not counted(server)


def test_the_same_key_with_another_length_is_counted_once(server: RedisServer) -> None:
    tier = node(server.url)
    assert tier.put(header(1, length=50), memoryview(bytes(50)))
    for other in (node(server.url), tier):
        put(other, [1])
        assert server.client.zcard(NAMES.account(A, "0")) == 1
    server.client.zadd(NAMES.account(A, "0"), {header(1).key + (50).to_bytes(8, "big"): 1.0})
    mend(tier)
    assert server.client.zcard(NAMES.account(A, "0")) == 1
    assert there(tier, [1]) == [1]


def test_nobody_pays_where_there_is_no_share_and_hardly_where_there_is(server: RedisServer) -> None:
    chunks = [(header(number, length=PART_BYTES), memoryview(bytes(PART_BYTES))) for number in range(8)]
    into = memoryview(bytearray(PART_BYTES))
    found = []
    for shares in ({}, {A: 0.5}):
        tier = node(server.url, shares, capacity=1 << 30)
        server.client.config_resetstat()
        assert all(tier.put_all(chunks))
        assert tier.get(chunks[0][0], into)
        tier.shares.keep()
        found.append({name: count for name, count in calls(server).items() if name not in ("config|resetstat", "info")})
    assert found[0] == {"set": 16, "get": 2}
    assert {name: found[1][name] for name in ("set", "get", "zadd")} == {"set": 16, "get": 2, "zadd": 2}, "one for a go, one for a read"
    assert set(found[1]) - {"set", "get", "zadd"} == {"zscan", "zrangebyscore"}, "once for a new tenant, and beside the bytes"
