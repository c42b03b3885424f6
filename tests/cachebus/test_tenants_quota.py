"""A tenant's share of the cache, from the file to the daemon."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from tests_shared import ANSWER_MS, DIGEST_KEY, LAYOUT, Bus, wait_for

from cachebus import tenants as module
from cachebus.keys import tenant_id
from cachebus.messages import Commit, NewEntry, Reserve, Reserved, Snapshot, SnapshotReply, WrittenEntry
from cachebus.settings import SecuritySettings
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
