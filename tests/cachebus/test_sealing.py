"""Encryption at rest: on disk and in Redis nothing of a chunk can be read, and what was changed or swapped does not open."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from redis_server import RedisServer
from test_below import LENGTH, clear, content, get, put, restarted, settled
from tests_shared import DIGEST_KEY, LAYOUT, Bus, wait_for

from cachebus.chunk import ChunkHeader, pack_header, unpack_header
from cachebus.sealing import Sealer
from cachebus.settings import CacheSettings, SecuritySettings

HEADER = ChunkHeader(b"k" * 32, LAYOUT, b"d" * 32, 0, b"i" * 8)


@pytest.mark.parametrize("length", [1, 15, 16, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_what_is_sealed_opens_again_in_place_of_its_length(length: int) -> None:
    plain = random.Random(length).randbytes(length)
    sealer = Sealer(DIGEST_KEY)
    header, sealed = sealer.seal(replace(HEADER, length=length), memoryview(plain))
    stored = bytes(sealed)
    assert len(stored) == length
    assert length < 16 or stored[:16] not in plain
    into = bytearray(length)
    found = unpack_header(pack_header(header))
    assert found == header
    assert Sealer(DIGEST_KEY).open(header, memoryview(stored), memoryview(into))
    assert bytes(into) == plain


def test_what_is_changed_or_swapped_or_from_another_cluster_does_not_open() -> None:
    plain = memoryview(bytes(5000))
    sealer = Sealer(DIGEST_KEY)
    header, sealed = sealer.seal(replace(HEADER, length=5000), plain)
    stored = bytes(sealed)
    into = memoryview(bytearray(5000))
    wrong = [replace(header, key=b"K" * 32), replace(header, tenant=b"t" * 8), replace(header, layout=b"L" * 16), replace(header, seal=bytes(28))]
    assert not any(sealer.open(other, memoryview(stored), into) for other in wrong)
    assert not Sealer(b"x" * 32).open(header, memoryview(stored), into)
    for place in range(0, 5000, 7):
        changed = bytearray(stored)
        changed[place] ^= 1 << (place % 8)
        assert not sealer.open(header, memoryview(changed), into)
    assert sealer.open(header, memoryview(stored), into)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@pytest.mark.parametrize("sealed", [True, False])
def test_disk_and_redis_hold_nothing_that_can_be_read(tmp_path: Path, server: RedisServer, sealed: bool) -> None:
    secured = SecuritySettings(encrypt_at_rest=sealed, digest_key_file="elsewhere")
    cache = CacheSettings(local_disk=str(tmp_path / "disk"), max_local_disk_size=0.02, remote_url=server.url)
    bus = Bus(tmp_path, cache, secured)
    wait_for(lambda: bool(bus.daemon.statistics()["redis_usable"]))
    put(bus, 1, 2)
    settled(bus)
    canary = content(1)[5000:5032]
    assert (canary in (tmp_path / "disk" / "segment-00000").read_bytes()) is not sealed
    assert any(canary in (server.client.get(name) or b"") for name in server.client.scan_iter()) is not sealed
    restarted(bus)
    assert get(bus, 1) == [(content(1), "nvme")]
    wait_for(lambda: bool(bus.daemon.statistics()["redis_usable"]))
    clear(bus, "dram", "nvme")
    assert get(bus, 1, 2) == [(content(1), "redis"), (content(2), "redis")]
    bus.stop()
    bus.security = msgspec.structs.replace(secured, encrypt_at_rest=not sealed)
    (tmp_path / "region").unlink(missing_ok=True)
    bus.start()
    assert get(bus, 1) == [], "what is sealed differently is foreign"
    bus.stop()


def test_a_sealed_chunk_that_is_changed_on_disk_is_a_miss(tmp_path: Path) -> None:
    cache = CacheSettings(local_disk=str(tmp_path / "disk"), max_local_disk_size=0.02)
    bus = Bus(tmp_path, cache, SecuritySettings(encrypt_at_rest=True, digest_key_file="elsewhere"))
    put(bus, 1)
    settled(bus)
    segment = tmp_path / "disk" / "segment-00000"
    bus.stop()
    changed = bytearray(segment.read_bytes())
    changed[4096 + LENGTH // 2] ^= 4
    segment.write_bytes(changed)
    (tmp_path / "region").unlink(missing_ok=True)
    bus.start()
    assert get(bus, 1) == []
    assert bus.daemon.statistics()["nvme_integrity_failures_total"] == 1
    put(bus, 1)
    assert get(bus, 1) == [(content(1), "dram")]
    bus.stop()
