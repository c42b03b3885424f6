"""A daemon with its lower tiers, all of it real: stop, start, and what was stored is there; what was changed meanwhile is not."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3
from redis_server import RedisServer
from tests_shared import ANSWER_MS, DIGEST_KEY, LAYOUT, Bus, wait_for

from cachebus.messages import Acquire, Commit, Granted, NewEntry, Quarantine, Release, Reserve, Reserved, WrittenEntry
from cachebus.messages_tools import Clear, Count
from cachebus.region import Region
from cachebus.settings import CacheSettings
from cachebus.table import State

LENGTH = 300_000


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def content(number: int, length: int = LENGTH) -> bytes:
    return random.Random(number).randbytes(length)


def put(bus: Bus, *numbers: int, length: int = LENGTH, tenant: bytes = bytes(8)) -> None:
    client = bus.client(bus.holder)
    region = Region.map(bus.run_dir / "region")
    reserved = client.call(Reserve(bus.holder.id, LAYOUT, [NewEntry(key(n), length, tenant=tenant) for n in numbers]), ANSWER_MS)
    assert isinstance(reserved, Reserved)
    assert [slot.key for slot in reserved.slots] == [key(n) for n in numbers]
    written = []
    for n, slot in zip(numbers, reserved.slots, strict=True):
        region.data[slot.offset : slot.offset + length] = content(n, length)
        written.append(WrittenEntry(slot.slot, slot.generation, blake3(content(n, length), key=DIGEST_KEY).digest()))
    client.submit(Commit(bus.holder.id, written))
    wait_for(lambda: bus.daemon.statistics()["writing"] == 0)
    client.close()
    region.close()


def get(bus: Bus, *numbers: int, layout: bytes = LAYOUT, check: bool = False) -> list[tuple[bytes, str]]:
    """The bytes and the source of every chunk that came. ``check``: as an engine does, which quarantines what fails its digest."""
    client = bus.client(bus.holder)
    region = Region.map(bus.run_dir / "region")
    granted = client.call(Acquire(bus.holder.id, layout, [key(n) for n in numbers], 500), ANSWER_MS)
    assert isinstance(granted, Granted)
    found = []
    for extent in granted.extents:

        def state(slot: int = extent.slot) -> State | None:
            # The daemon may be writing the record just now; one that is unreadable thrice is gone.
            for _ in range(3):
                if (record := region.table.record(slot)) is not None:
                    return record.state
                time.sleep(0.002)
            return None

        if not extent.ready:
            wait_for(lambda state=state: state() != State.RESERVED)  # type: ignore[misc]
            if state() != State.COMMITTED:
                break
        text = bytes(region.data[extent.offset : extent.offset + extent.length])
        if check and blake3(text, key=DIGEST_KEY).digest() != extent.digest:
            client.call(Quarantine(extent.key, extent.digest), ANSWER_MS)
            break
        found.append((text, extent.source))
    client.submit(Release([granted.lease]))
    client.close()
    region.close()
    return found


def clear(bus: Bus, *tiers: str) -> None:
    client = bus.client(bus.holder)
    assert isinstance(client.call(Clear(list(tiers)), ANSWER_MS), Count)  # type: ignore[arg-type]
    client.close()


def settled(bus: Bus) -> None:
    wait_for(lambda: bus.daemon.statistics()["write_behind_bytes"] == 0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def cache(tmp_path: Path) -> CacheSettings:
    return CacheSettings(local_disk=str(tmp_path / "disk"), max_local_disk_size=0.02)


def started(run_dir: Path, cache: CacheSettings) -> Bus:
    bus = Bus(run_dir, cache)
    if cache.remote_url:
        wait_for(lambda: bool(bus.daemon.statistics()["redis_usable"]))
    return bus


def restarted(bus: Bus) -> None:
    """Everything ends, and the region is gone."""
    bus.stop()
    (bus.run_dir / "region").unlink(missing_ok=True)
    bus.start()


def test_what_was_stored_is_there_after_everything_was_stopped(tmp_path: Path, cache: CacheSettings) -> None:
    bus = started(tmp_path, cache)
    put(bus, 1, 2, 3)
    settled(bus)
    assert get(bus, 1, 2, 3) == [(content(n), "dram") for n in (1, 2, 3)]
    restarted(bus)
    assert get(bus, 1, 2, 3, 4) == [(content(n), "nvme") for n in (1, 2, 3)]
    assert get(bus, 1, 2, 3, 4) == [(content(n), "dram") for n in (1, 2, 3)]
    bus.stop()


def test_a_changed_chunk_on_disk_is_never_served(tmp_path: Path, cache: CacheSettings) -> None:
    bus = started(tmp_path, cache)
    put(bus, 1, 2)
    settled(bus)
    bus.stop()
    (bus.run_dir / "region").unlink(missing_ok=True)
    segment = tmp_path / "disk" / "segment-00000"
    bytes_there = bytearray(segment.read_bytes())
    place = bytes_there.index(content(2)[:64])
    bytes_there[place + 1000] ^= 1
    segment.write_bytes(bytes_there)
    bus.start()
    assert get(bus, 1, 2) == [(content(1), "nvme")]
    assert bus.daemon.statistics()["nvme_integrity_failures_total"] == 1
    assert get(bus, 1, 2) == [(content(1), "dram")]
    put(bus, 2)
    settled(bus)
    restarted(bus)
    assert get(bus, 1, 2) == [(content(n), "nvme") for n in (1, 2)]
    bus.stop()


def test_dram_that_overflows_goes_on_from_disk(tmp_path: Path, cache: CacheSettings) -> None:
    bus = started(tmp_path, cache)
    numbers = range(40)
    for n in numbers:
        put(bus, n)
        settled(bus)
    assert bus.daemon.statistics()["evicted_total"] > 0
    for n in numbers:
        assert [text for text, _ in get(bus, n)] == [content(n)]
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "disk").iterdir()) <= 20_000_000
    bus.stop()


def test_the_shared_tier_serves_what_no_other_has(tmp_path: Path, cache: CacheSettings, server: RedisServer) -> None:
    bus = started(tmp_path, msgspec.structs.replace(cache, remote_url=server.url))
    put(bus, 1, 2)
    settled(bus)
    clear(bus, "dram", "nvme")
    assert get(bus, 1, 2, 3) == [(content(n), "redis") for n in (1, 2)]
    settled(bus)
    assert bus.daemon.statistics()["nvme_chunks"] == 2, "what came up is kept on disk, too"
    bus.stop()


def test_another_node_finds_it_in_the_shared_tier(tmp_path: Path, server: RedisServer) -> None:
    first = started(tmp_path, CacheSettings(remote_url=server.url))
    put(first, 1, 2)
    settled(first)
    (tmp_path / "other").mkdir()
    second = started(tmp_path / "other", CacheSettings(remote_url=server.url))
    assert get(second, 1, 2) == [(content(n), "redis") for n in (1, 2)]
    first.stop()
    second.stop()


def test_a_shared_tier_that_dies_and_comes_back_empty_is_a_miss_and_then_filled_again(tmp_path: Path, server: RedisServer) -> None:
    bus = started(tmp_path, CacheSettings(remote_url=server.url))
    put(bus, 1)
    settled(bus)
    clear(bus, "dram")
    server.kill()
    assert get(bus, 1) == []
    put(bus, 2)
    assert get(bus, 2) == [(content(2), "dram")]
    server.start()
    wait_for(lambda: bool(bus.daemon.statistics()["redis_usable"]))
    wait_for(lambda: bus.daemon.statistics()["redis_chunks"] == 1, 5)
    assert get(bus, 1) == []
    clear(bus, "dram")
    assert get(bus, 2) == [(content(2), "redis")], "what was written while it was away went there when it was back"
    bus.stop()


def test_a_paused_shared_tier_costs_less_than_a_tenth_of_a_second(tmp_path: Path, server: RedisServer) -> None:
    bus = started(tmp_path, CacheSettings(remote_url=server.url))
    put(bus, 1)
    settled(bus)
    clear(bus, "dram")
    server.pause()
    assert get(bus, 1) == []
    assert not bus.daemon.statistics()["redis_usable"]
    server.go_on()
    wait_for(lambda: bool(bus.daemon.statistics()["redis_usable"]), 6)
    assert get(bus, 1) == [(content(1), "redis")]
    bus.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk_makes_the_tier_read_only_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True)
    try:
        bus = started(tmp_path, CacheSettings(local_disk=str(folder), max_local_disk_size=0.02))
        for n in range(10):
            put(bus, n)
            settled(bus)
            assert get(bus, n) == [(content(n), "dram")]
        assert bus.daemon.statistics()["nvme_usable"]
        bus.stop()
    finally:
        subprocess.run(["umount", folder], check=True)


def test_clearing_a_tier_that_there_is_not_leaves_the_daemon_alone(bus: Bus) -> None:
    client = bus.client()
    for tenant in (b"", b"tenant-a"):
        assert client.call(Clear(["nvme", "redis", "peer"], tenant), ANSWER_MS) == Count(0)
    client.close()
