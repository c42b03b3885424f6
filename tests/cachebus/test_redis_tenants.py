"""The shared tier and tenants, on a real server: one's chunks can be deleted, and a chunk may be stored for a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from redis_server import RedisServer
from tests_shared import DIGEST_KEY, wait_for

from cachebus.chunk import ChunkHeader, key_id
from cachebus.effects import Wipe
from cachebus.lanes import Memory
from cachebus.redis import Remote, RemoteSettings
from cachebus.redis_names import Names
from cachebus.remote_lane import LOOKED_AT_ONCE, RemoteLane

A, B = b"tenant-a", b"tenant-b"
PAYLOAD = memoryview(b"x" * 100)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    made = RedisServer(tmp_path)
    yield made
    made.stop()


def header(number: int, tenant: bytes, expires_at: int = 0) -> ChunkHeader:
    digest = blake3(PAYLOAD, key=DIGEST_KEY).digest()
    return ChunkHeader(number.to_bytes(32, "big"), b"l" * 16, digest, len(PAYLOAD), key_id(DIGEST_KEY), tenant, expires_at=expires_at)


def test_a_tenants_chunks_are_found_by_their_headers_and_deleted(server: RedisServer) -> None:
    tier = Remote(RemoteSettings(server.url, key_id(DIGEST_KEY), 60, 2000))
    tier.tick()
    count = LOOKED_AT_ONCE + 10
    assert all(tier.put_all([(header(number, A if number % 2 else B), PAYLOAD) for number in range(count)]))
    # What another node counts, to whom a share is known.
    server.client.zadd(Names(key_id(DIGEST_KEY)).account(A, "0"), {header(1, A).key + len(PAYLOAD).to_bytes(8, "big"): 1.0})
    lane = RemoteLane(tier, Memory(memoryview(bytearray(PAYLOAD)), DIGEST_KEY), readers=1, writers=1, wake=lambda: None)
    try:
        wait_for(lambda: lane.usable)
        lane.start(Wipe("redis", tenant=A))
        wait_for(lambda: server.client.dbsize() == count)
        assert {int.from_bytes(key, "big") % 2 for key in tier.scan()} == {0}
        known: list[set[bytes]] = []
        wait_for(lambda: known.extend(set(held.added) for held in lane.held()) or (bool(known) and len(known[-1]) == count // 2))
    finally:
        lane.close(5)


@pytest.mark.parametrize(("ttl", "own", "most"), [(60, 20, 20), (10, 20, 10), (0, 20, 20), (60, 0, 60), (60, -5, 1)])
def test_what_is_stored_for_a_time_is_kept_no_longer(server: RedisServer, ttl: int, own: int, most: int) -> None:
    tier = Remote(RemoteSettings(server.url, key_id(DIGEST_KEY), ttl, 2000))
    tier.tick()
    wanted = header(1, A, int(time.time()) + own if own else 0)
    assert tier.put(wanted, PAYLOAD)
    assert tier.probe([wanted.key]) == [wanted]
    assert all(most - 3 < server.client.ttl(name) <= most for name in server.client.keys("*"))
    assert tier.put(replace(wanted, key=b"k" * 32, expires_at=0), PAYLOAD)
    assert server.client.ttl(tier._name(b"k" * 32)) == (ttl or -1)
