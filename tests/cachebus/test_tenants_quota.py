"""A tenant's share of the cache, from the file to the daemon."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from redis_server import RedisServer
from tests_shared import ANSWER_MS, DIGEST_KEY, LAYOUT, Bus, wait_for

from cachebus import tenants as module
from cachebus.keys import tenant_id
from cachebus.messages import Commit, NewEntry, Reserve, Reserved, Snapshot, SnapshotReply, WrittenEntry
from cachebus.messages_tools import Clear, Count
from cachebus.redis_account import taken_bytes
from cachebus.settings import CacheSettings, SecuritySettings
from cachebus.tenants import Tenants, read_tenants

MEGABYTE = 1 << 20


def store(bus: Bus, tenant: bytes, first: int, count: int) -> int:
    """Stores chunks of a megabyte one after the other; how many of all are there then."""
    client = bus.client()
    for number in range(first, first + count):
        entry = NewEntry(number.to_bytes(32, "big"), MEGABYTE, False, tenant)
        reserved = client.call(Reserve(bus.holder.id, LAYOUT, [entry]), ANSWER_MS)
        assert isinstance(reserved, Reserved)
        client.submit(Commit(bus.holder.id, [WrittenEntry(s.slot, s.generation, b"d" * 32) for s in reserved.slots]))
    reply = client.call(Snapshot(), ANSWER_MS)
    client.close()
    assert isinstance(reply, SnapshotReply)
    return len(reply.keys["dram"])


def test_a_share_is_the_files_also_when_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    path = tmp_path / "tenants.yaml"
    path.write_text("small:\n  cache_share_max: 0.3\nfree:\n  keys: []\n")
    (tmp_path / "run").mkdir()
    bus = Bus(tmp_path / "run", security=SecuritySettings(tenants_file=str(path)))
    try:
        tenants = Tenants(read_tenants(path), DIGEST_KEY)
        small, free = tenant_id(tenants.salts["small"]), tenant_id(tenants.salts["free"])
        assert store(bus, small, 0, 5) == 2
        assert store(bus, free, 100, 4) == 6
        path.write_text("small:\n  cache_share_max: 0.45\nfree:\n  keys: []\n")
        numbers = itertools.count(1000)
        wait_for(lambda: store(bus, small, next(numbers), 1) == 7)
        assert store(bus, small, 200, 4) == 7
    finally:
        bus.stop()
        bus.holder.close()


def test_a_share_of_the_shared_tier_is_the_files_too_for_all_nodes_and_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    server = RedisServer(tmp_path)
    path = tmp_path / "tenants.yaml"
    path.write_text("small:\n  cache_share_max: 0.3\nfree:\n  keys: []\n")
    cache = CacheSettings(remote_url=server.url, remote_timeout_ms=2000, remote_capacity_gb=10 * taken_bytes(MEGABYTE) / 1e9)
    buses = [Bus(made(tmp_path / name), cache, SecuritySettings(tenants_file=str(path))) for name in ("one", "two")]
    tenants = Tenants(read_tenants(path), DIGEST_KEY)
    small, free = tenant_id(tenants.salts["small"]), tenant_id(tenants.salts["free"])
    try:
        for bus in buses:
            wait_for(lambda bus=bus: bool(bus.daemon.statistics()["redis_usable"]))  # type: ignore[misc]
        fill(buses[0], free, 100, 8)
        fill(buses[0], small, 0, 5)
        wait_for(lambda: told(buses[0]) == there(server) == {*range(100, 108), 2, 3, 4})
        assert buses[0].daemon.statistics()["redis_evicted_total"] == 2
        fill(buses[1], small, 10, 2)
        wait_for(lambda: there(server) == {*range(100, 108), 4, 10, 11})
        buses[0].stop()
        # What DRAM has and Redis has not would be written there once more.
        (buses[0].run_dir / "region").unlink(missing_ok=True)
        buses[0].start()
        wait_for(lambda: bool(buses[0].daemon.statistics()["redis_usable"]))
        fill(buses[0], small, 20, 1)
        assert there(server) == {*range(100, 108), 10, 11, 20}
        path.write_text("small:\n  cache_share_max: 0.1\nfree:\n  keys: []\n")
        wait_for(lambda: there(server) == {*range(100, 108), 20})
        client = buses[1].client()
        assert isinstance(client.call(Clear(["redis"], small), ANSWER_MS), Count)
        client.close()
        wait_for(lambda: there(server) == {*range(100, 108)} and not server.client.keys("*share*"))
    finally:
        for bus in buses:
            bus.stop()
            bus.holder.close()
        server.stop()


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def fill(bus: Bus, tenant: bytes, first: int, count: int) -> None:
    """Stores chunks one by one, each written to the shared tier before the next comes."""
    for number in range(first, first + count):
        store(bus, tenant, number, 1)
        wait_for(lambda: bus.daemon.statistics()["write_behind_bytes"] == 0)


def there(server: RedisServer) -> set[int]:
    """The chunks on the server."""
    return {int(name[-65:-1], 16) for name in server.client.keys("*}") if b"share" not in name}


def told(bus: Bus) -> set[int]:
    """The chunks that the bus says are in the shared tier."""
    return {int.from_bytes(key, "big") for key in bus.snapshot().keys["redis"]}
