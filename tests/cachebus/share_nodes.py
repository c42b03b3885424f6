"""Nodes that share one Redis in which a tenant has a share, and what is seen of it from outside."""

from __future__ import annotations

import time
from collections.abc import Sequence

from redis_server import RedisServer
from tests_shared import DIGEST_KEY

from cachebus.chunk import ChunkHeader, key_id
from cachebus.redis import Remote, RemoteSettings
from cachebus.redis_account import taken_bytes
from cachebus.redis_names import Names
from cachebus.redis_shares import ShareSettings

A, B = b"tenant-a", b"tenant-b"
SIZE = 100_000
PAYLOAD = memoryview(bytes(SIZE))
ROOM = 10 * taken_bytes(SIZE)
"""What a tenant may take in these tests, by its share."""
CAPACITY = 40 * taken_bytes(SIZE)
NAMES = Names(key_id(DIGEST_KEY))


def node(url: str, shares: dict[bytes, float] | None = None, capacity: int = CAPACITY, ttl: int = 60, timeout_ms: int = 2000) -> Remote:
    """The shared tier as one node has it; a quarter of it for the tenant A, where nothing else is said."""
    tier = Remote(RemoteSettings(url, key_id(DIGEST_KEY), ttl, timeout_ms, ShareSettings(capacity_bytes=capacity, ttl_seconds=ttl)))
    tier.tick()
    tier.shares.share({A: 0.25} if shares is None else shares)
    return tier


def header(number: int, tenant: bytes = A, length: int = SIZE) -> ChunkHeader:
    return ChunkHeader(number.to_bytes(32, "big"), b"l" * 16, b"d" * 32, length, key_id(DIGEST_KEY), tenant, written_at=int(time.time()))


def put(tier: Remote, numbers: Sequence[int], tenant: bytes = A) -> list[bool]:
    return tier.put_all([(header(number, tenant), PAYLOAD) for number in numbers])


def there(tier: Remote, numbers: Sequence[int]) -> list[int]:
    return [number for number, found in zip(numbers, tier.probe([header(number).key for number in numbers]), strict=True) if found]


def counted(server: RedisServer, tenant: bytes = A) -> set[int]:
    """The chunks in a tenant's account on the server."""
    members: list[bytes] = server.client.zrange(NAMES.account(tenant, "0"), 0, -1)  # type: ignore[assignment]
    return {int.from_bytes(member[:32], "big") for member in members}


def mend(tier: Remote) -> None:
    tier.shares.mend(set(tier.scan()), tier.probe)


def calls(server: RedisServer) -> dict[str, int]:
    """How often each command was called."""
    found: dict[str, dict[str, int]] = server.client.info("commandstats")  # type: ignore[assignment]
    return {name.removeprefix("cmdstat_"): said["calls"] for name, said in found.items()}
