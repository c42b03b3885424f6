"""Tenants' shares where the shared tier is a cluster, speaks TLS, or is what a sentinel names."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from redis_forms import Certificates, RedisCluster, TlsServer, Watched
from test_redis import chunk
from test_redis_forms import served
from tests_shared import DIGEST_KEY, wait_for

from cachebus.chunk import ChunkHeader, key_id
from cachebus.redis import Remote, RemoteSettings, RemoteUnavailable
from cachebus.redis_account import taken_bytes
from cachebus.redis_shares import ShareSettings

SHARED = b"tenant-a"
SHARED_ROOM = 8 * taken_bytes(100_000)


def shared(url: str, capacity: int = 4 * SHARED_ROOM) -> Remote:
    """A tier in which a tenant has a quarter."""
    settings = ShareSettings(capacity_bytes=capacity, ttl_seconds=60)
    tier = Remote(RemoteSettings(url, key_id(DIGEST_KEY), 60, 2000, settings))
    tier.tick()
    tier.shares.share({SHARED: 0.25})
    return tier


def fill(tier: Remote, numbers: range, tenant: bytes = SHARED) -> list[int]:
    """Stores chunks one by one; those of all up to them that are there then."""
    for number in numbers:
        header, payload = chunk(number, 100_000)
        tier.put(replace(header, tenant=tenant), payload)
    return [n for n, found in enumerate(tier.probe([chunk(number, 1)[0].key for number in range(numbers.stop)])) if found]


def mended(tier: Remote) -> None:
    tier.shares.mend(set(tier.scan()), tier.probe)
    tier.shares.keep()


def test_shares_hold_on_every_node_of_a_cluster(cluster: RedisCluster) -> None:
    tier = shared(cluster.url, 3 * 4 * SHARED_ROOM)
    others = fill(tier, range(1000, 1012), b"tenant-b")
    assert others == [*range(1000, 1012)]
    kept = fill(tier, range(100))
    assert len(kept) == 3 * 8
    names = [node.client.keys("*share*") for node in cluster.nodes]
    assert [len(found) for found in names] == [1, 1, 1], "each keeps its own account"
    assert [node.client.zcard(name) for node, (name,) in zip(cluster.nodes, names, strict=True)] == [8, 8, 8]
    assert fill(tier, range(1012, 1012))[-12:] == others
    again = shared(cluster.url, 3 * 4 * SHARED_ROOM)
    assert len(fill(again, range(100, 130))) == 3 * 8
    again.shares.forget(SHARED)
    assert not any(node.client.keys("*share*") for node in cluster.nodes)
    assert tier.counts["timeouts"] == again.counts["timeouts"] == 0


def test_accounts_follow_a_slot_that_moves(plain_cluster: RedisCluster) -> None:
    tier = shared(plain_cluster.url, 3 * 4 * SHARED_ROOM)
    kept = fill(tier, range(9))
    assert len(kept) == 9
    name = next(name for node in plain_cluster.nodes for name in node.client.keys("*share*"))
    before = plain_cluster.node_of(name)
    plain_cluster.move(name, (before + 1) % 3)
    mended(tier)
    tier.tick()
    mended(tier)
    assert fill(tier, range(9, 9)) == kept
    counted = [len([node.client.zcard(name) for name in node.client.keys("*share*")]) for node in plain_cluster.nodes]
    assert min(counted) == 1, "a node that lost its account has another"
    held = [(node.client.dbsize() - count) // 2 for node, count in zip(plain_cluster.nodes, counted, strict=True)]
    assert sum(held) == 9
    assert [tier.shares._accounts[place, SHARED].taken_bytes // taken_bytes(100_000) for place in places(plain_cluster)] == held
    name = tier._name(chunk(kept[0], 1)[0].key).encode()
    before = plain_cluster.node_of(name)
    plain_cluster.move(name, (before + 1) % 3)
    # It is found where it is now once the cluster was looked up again.
    assert not served(tier, *tagged(kept[0]))
    tier.tick()
    mended(tier)
    held[before] -= 1
    held[(before + 1) % 3] += 1
    assert [tier.shares._accounts[place, SHARED].taken_bytes // taken_bytes(100_000) for place in places(plain_cluster)] == held
    assert len(fill(tier, range(9, 100))) == 3 * 8


def places(cluster: RedisCluster) -> list[str]:
    return [f"127.0.0.1:{node.port}" for node in cluster.nodes]


def test_shares_hold_on_the_nodes_that_live(plain_cluster: RedisCluster) -> None:
    tier = shared(plain_cluster.url, 3 * 4 * SHARED_ROOM)
    assert len(fill(tier, range(60))) == 3 * 8
    plain_cluster.nodes[1].kill()
    for number in range(60, 120):
        put_chunk(tier, number)
    mended(tier)
    assert [node.client.dbsize() for node in (plain_cluster.nodes[0], plain_cluster.nodes[2])] == [17, 17]
    assert tier.available


def put_chunk(tier: Remote, number: int) -> None:
    header, payload = chunk(number, 100_000)
    with contextlib.suppress(RemoteUnavailable):
        tier.put(replace(header, tenant=SHARED), payload)


def test_shares_with_tls(tmp_path: Path, certificates: Certificates) -> None:
    server = TlsServer(tmp_path, certificates)
    tier = shared(f"{server.url}?ssl_ca_certs={certificates.ca}")
    assert fill(tier, range(20)) == [*range(12, 20)]
    mended(tier)
    assert served(tier, *tagged(19))
    server.stop()


def tagged(number: int) -> tuple[ChunkHeader, memoryview]:
    header, payload = chunk(number, 100_000)
    return replace(header, tenant=SHARED), payload


def test_shares_outlive_a_failover(watched: Watched) -> None:
    tier = shared(watched.url)
    assert fill(tier, range(20)) == [*range(12, 20)]
    wait_for(watched.replicated)
    watched.master.kill()
    assert not served(tier, *tagged(19))
    wait_for(tier.tick, 20)
    mended(tier)
    assert fill(tier, range(20, 24)) == [*range(16, 24)]
