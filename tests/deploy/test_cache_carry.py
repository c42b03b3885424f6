"""``headstart cache export`` and ``import`` between buses that run."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from redis_server import RedisServer
from test_below import LENGTH, clear, content, get, key, put, settled
from tests_shared import ANSWER_MS, DIGEST_KEY, LAYOUT, Bus, wait_for

from cachebus import archive
from cachebus.archive import ArchiveWriter
from cachebus.chunk import ChunkHeader, key_id
from cachebus.disk import Disk
from cachebus.messages import Commit, NewEntry, Reserve, Reserved, WrittenEntry
from cachebus.region import Region
from cachebus.settings import CacheSettings
from deploy.cache import exporting
from deploy.cache.member import Member
from deploy.cli import main

MakeBus = Callable[..., Bus]


@pytest.fixture
def make_bus(tmp_path: Path) -> Iterator[MakeBus]:
    made: list[Bus] = []

    def make(name: str, cache: CacheSettings = CacheSettings()) -> Bus:  # noqa: B008
        (tmp_path / name).mkdir()
        made.append(Bus(tmp_path / name, cache))
        return made[-1]

    yield make
    for bus in made:
        bus.stop()
        bus.daemon._directory.check_integrity()
        bus.holder.close()


def cache(bus: Bus, *arguments: str | Path) -> int:
    return main(["cache", *map(str, arguments), "--set", f"cache.run_dir={bus.run_dir}"])


def summary(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def texts(bus: Bus, *numbers: int) -> list[bytes]:
    return [text for n in numbers for text, _ in get(bus, n)]


def held(bus: Bus) -> dict[str, float]:
    """What a tool may not leave behind."""
    return {name: bus.daemon.statistics()[name] for name in ("writing", "leases")}


def clean(bus: Bus) -> None:
    wait_for(lambda: held(bus) == {"writing": 0, "leases": 0})


def test_a_cache_is_carried_to_another_node_byte_for_byte(make_bus: MakeBus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, file = make_bus("a"), make_bus("b"), tmp_path / "warm.kv"
    put(first, 1, 2, 3)
    assert cache(first, "export", file, "--json") == 0
    found = summary(capsys)
    assert (found["exported"], found["gone"], found["bad"], found["bytes"]) == (3, 0, 0, 3 * LENGTH)
    assert file.stat().st_mode & 0o777 == 0o600
    assert not file.with_name("warm.kv.part").exists()
    assert cache(second, "import", file, "--json") == 0
    found = summary(capsys)
    assert {name: found[name] for name in ("imported", "already_there", "bad", "no_room", "evicted_again", "complete")} == {
        "imported": 3,
        "already_there": 0,
        "bad": 0,
        "no_room": 0,
        "evicted_again": 0,
        "complete": True,
    }
    clean(first)
    clean(second)
    assert texts(second, 1, 2, 3) == [content(n) for n in (1, 2, 3)]
    assert cache(second, "import", file) == 0
    said = capsys.readouterr()
    assert "imported 0 chunks" in said.out
    assert "3 already there, 0 refused as bad, 0 without room" in said.out
    assert "3 there" in said.err


def test_layout_tenant_and_tokens_in_a_chunk_are_carried(make_bus: MakeBus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, file = make_bus("a"), make_bus("b"), tmp_path / "warm.kv"
    client, region = first.client(first.holder), Region.map(first.run_dir / "region")
    layout, tenant, text = b"L" * 16, b"someone!", random.Random(9).randbytes(5000)
    reserved = client.call(Reserve(first.holder.id, layout, [NewEntry(key(9), 5000, tenant=tenant)]), ANSWER_MS)
    assert isinstance(reserved, Reserved)
    (slot,) = reserved.slots
    region.data[slot.offset : slot.offset + 5000] = text
    client.submit(Commit(first.holder.id, [WrittenEntry(slot.slot, slot.generation, blake3(text, key=DIGEST_KEY).digest())]))
    client.close()
    region.close()
    put(first, 1)
    assert cache(first, "export", file) == 0
    assert cache(second, "import", file) == 0
    entry = second.daemon._directory.dram.index[key(9)]
    assert (entry.layout, entry.tenant, entry.length) == (layout, tenant, 5000)
    assert second.daemon._directory.dram.index[key(1)].layout == LAYOUT
    third = make_bus("c", CacheSettings(chunk_size=512))
    assert cache(third, "import", file) == 2
    assert "have 256 tokens, and cache.chunk_size is 512 here" in capsys.readouterr().err


def test_only_what_was_asked_for_is_written(make_bus: MakeBus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bus, file = make_bus("a", CacheSettings(local_disk=str(tmp_path / "disk"), max_local_disk_size=0.02)), tmp_path / "some.kv"
    put(bus, 1, 2, 0x1100)
    settled(bus)
    assert cache(bus, "export", file, "--json", "--keys", key(1).hex(), key(0x1100).hex()[:61]) == 0
    assert summary(capsys)["exported"] == 2
    assert cache(bus, "export", file, "--keys", "beef") == 2
    assert "'beef' is the beginning of no chunk's key" in capsys.readouterr().err
    assert cache(bus, "export", file, "--json", "--tier", "nvme") == 0
    assert summary(capsys)["exported"] == 3
    assert cache(bus, "export", file, "--json", "--tier", "redis") == 0
    assert summary(capsys)["exported"] == 0


def test_chunks_of_lower_tiers_are_brought_up_more_than_dram_holds(make_bus: MakeBus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = CacheSettings(local_disk=str(tmp_path / "disk"), max_local_disk_size=0.02)
    first, file = make_bus("a", disk), tmp_path / "all.kv"
    for n in range(40):
        put(first, n)
        settled(first)
    clear(first, "dram")
    assert cache(first, "export", file, "--json") == 0
    assert summary(capsys)["exported"] == 40
    assert first.daemon.statistics()["nvme_promoted_total"] == 40
    clean(first)
    second = make_bus("b", CacheSettings(local_disk=str(tmp_path / "disk2"), max_local_disk_size=0.02))
    assert cache(second, "import", file, "--json") == 0
    found = summary(capsys)
    assert (found["imported"], found["no_room"], found["evicted_again"]) == (40, 0, 0)
    settled(second)
    assert texts(second, *range(40)) == [content(n) for n in range(40)]


@pytest.mark.parametrize("gigabytes", [1.0, 0.0012])
def test_an_import_waits_for_a_slow_disk(
    make_bus: MakeBus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, gigabytes: float
) -> None:
    fast = Disk.write

    def slow(*arguments: Any) -> None:
        time.sleep(0.05)
        fast(*arguments)

    monkeypatch.setattr(Disk, "write", slow)
    disk = CacheSettings(local_disk=str(tmp_path / "disk"), max_local_disk_size=0.03, write_behind_gb_max=gigabytes)
    bus, file = make_bus("a", disk), tmp_path / "large.kv"
    write(file, range(50))
    assert cache(bus, "import", file, "--json", "--set", f"cache.write_behind_gb_max={gigabytes}") == 0
    found = summary(capsys)
    assert (found["imported"], found["no_room"], found["evicted_again"]) == (50, 0, 0)
    settled(bus)
    assert bus.daemon.statistics()["nvme_chunks"] == 50


def test_a_file_begins_with_the_end_of_what_was_used_last_longest_ago(make_bus: MakeBus, tmp_path: Path) -> None:
    bus, file = make_bus("a"), tmp_path / "order.kv"
    put(bus, 1, 2, 3)
    put(bus, 4, 5)
    for n in (1, 2, 3):
        bus.daemon._directory.dram.index[key(n)].used_at -= 60
    assert cache(bus, "export", file) == 0
    order = []
    with file.open("rb") as opened:
        reader = archive.ArchiveReader(opened, DIGEST_KEY)
        for header in reader.headers():
            order.append(int.from_bytes(header.key, "big"))
            reader.skip(header)
    assert order == [3, 2, 1, 5, 4]


def test_what_only_the_shared_tier_has_is_exported_if_an_engine_of_its_kind_was_here(
    make_bus: MakeBus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = RedisServer(tmp_path)
    bus, file = make_bus("a", CacheSettings(remote_url=server.url)), tmp_path / "redis.kv"
    try:
        wait_for(lambda: bool(bus.daemon.statistics()["redis_usable"]))
        put(bus, 1, 2)
        settled(bus)
        clear(bus, "dram")
        assert cache(bus, "export", file, "--json") == 0
        assert (summary(capsys)["exported"], bus.daemon.statistics()["chunks"]) == (0, 0)
        bus.register_engine("w", "decode")
        assert cache(bus, "export", file, "--json") == 0
        assert summary(capsys)["exported"] == 2
    finally:
        server.stop()
    other = make_bus("b")
    assert cache(other, "import", file) == 0
    assert texts(other, 1, 2) == [content(1), content(2)]


def test_a_node_that_is_too_small_says_what_did_not_stay(make_bus: MakeBus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bus, file = make_bus("a"), tmp_path / "large.kv"
    write(file, range(40))
    assert cache(bus, "import", file, "--json") == 0
    found = summary(capsys)
    kept = int(bus.daemon.statistics()["chunks"])
    assert (found["imported"], found["evicted_again"]) == (40, 40 - kept)
    assert 0 < kept < 40
    assert texts(bus, 39) == [content(39)], "what comes last in a file was used last"
    assert cache(bus, "pin", *(row["key"] for row in listed(bus, capsys))) == 0
    write(file, range(50, 60))
    capsys.readouterr()
    assert cache(bus, "import", file, "--json") == 1
    found = summary(capsys)
    assert found["no_room"] > 0
    assert found["no_room"] + found["imported"] == 10


def listed(bus: Bus, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert cache(bus, "ls", "--json", "--limit", "0") == 0
    rows: list[dict[str, Any]] = summary(capsys)["chunks"]
    return rows


def write(file: Path, numbers: range, digest_key: bytes = DIGEST_KEY) -> None:
    with file.open("wb") as opened:
        writer = ArchiveWriter(opened, digest_key, 256)
        for n in numbers:
            digest = blake3(content(n), key=digest_key).digest()
            writer.add(ChunkHeader(key(n), LAYOUT, digest, LENGTH, key_id(digest_key)), memoryview(content(n)))
        writer.finish()


def test_a_file_of_another_digest_key_is_refused(make_bus: MakeBus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bus, file = make_bus("a"), tmp_path / "foreign.kv"
    write(file, range(2), b"o" * 32)
    assert cache(bus, "import", file) == 2
    said = capsys.readouterr().err
    assert key_id(b"o" * 32).hex() in said
    assert key_id(DIGEST_KEY).hex() in said
    assert bus.daemon.statistics()["chunks"] == 0
    clean(bus)


def test_a_changed_payload_is_counted_and_the_rest_imported(
    make_bus: MakeBus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, file = make_bus("a"), tmp_path / "bad.kv"
    write(file, range(3))
    raw = bytearray(file.read_bytes())
    raw[raw.index(content(1)) + 1000] ^= 1
    file.write_bytes(raw)
    assert cache(bus, "import", file, "--json") == 1
    found = summary(capsys)
    assert (found["imported"], found["bad"], found["complete"]) == (2, 1, True)
    clean(bus)
    assert texts(bus, 0, 1, 2) == [content(0), content(2)]
    monkeypatch.setattr(archive, "matches", lambda *_: True)
    assert cache(bus, "import", file) == 0
    (wrong,) = texts(bus, 1)
    assert wrong != content(1), "without the check the wrong bytes are taken"


def test_a_cut_file_is_noticed_and_what_came_before_stays(make_bus: MakeBus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bus, file = make_bus("a"), tmp_path / "cut.kv"
    write(file, range(3))
    raw = file.read_bytes()
    file.write_bytes(raw[: raw.index(content(2)) + LENGTH // 2])
    assert cache(bus, "import", file, "--json") == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["imported"], found["complete"]) == (2, False)
    assert "the file is cut: it ends at chunk 3" in said.err
    clean(bus)
    assert texts(bus, 0, 1, 2) == [content(0), content(1)]


def test_where_chunks_are_sealed_at_rest_the_file_is_too(make_bus: MakeBus, tmp_path: Path) -> None:
    first, second, file = make_bus("a"), make_bus("b"), tmp_path / "sealed.kv"
    put(first, 1, 2)
    assert cache(first, "export", file) == 0
    assert content(1)[:64] in file.read_bytes()
    sealing = ("--set", "security.encrypt_at_rest=true", "--set", f"security.digest_key_file={tmp_path / 'digest.key'}")
    assert cache(first, "export", file, *sealing) == 0
    raw = file.read_bytes()
    assert not any(content(n)[place : place + 16] in raw for n in (1, 2) for place in range(0, LENGTH - 16, 997))
    assert cache(second, "import", file) == 0
    assert texts(second, 1, 2) == [content(1), content(2)]


def test_a_chunk_that_rotted_in_dram_is_left_out(
    make_bus: MakeBus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, file = make_bus("a"), tmp_path / "rotten.kv"
    put(bus, 1, 2)
    region = Region.map(bus.run_dir / "region")
    region.data[bus.daemon._directory.dram.index[key(1)].offset + 7] ^= 1
    region.close()
    with monkeypatch.context() as unchecked:
        unchecked.setattr(exporting, "matches", lambda *_: True)
        assert cache(bus, "export", file, "--json") == 0
        assert summary(capsys)["exported"] == 2, "without the check it is written"
    assert cache(bus, "export", file, "--json") == 1
    found = summary(capsys)
    assert (found["exported"], found["bad"]) == (1, 1)
    assert texts(bus, 1, 2) == [content(2)]


def test_an_import_that_is_killed_leaves_nothing_reserved(make_bus: MakeBus, tmp_path: Path) -> None:
    bus, whole, pipe = make_bus("a"), tmp_path / "whole.kv", tmp_path / "pipe.kv"
    write(whole, range(3))
    raw = whole.read_bytes()
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "deploy", "cache", "import", str(pipe), "--set", f"cache.run_dir={bus.run_dir}"]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent.parent)
    try:
        with pipe.open("wb") as opened:
            opened.write(raw[: raw.index(content(1)) + LENGTH // 2])
            opened.flush()
            wait_for(lambda: bus.daemon.statistics()["writing"] == 1, 30)
            process.send_signal(signal.SIGKILL)
            process.wait()
            clean(bus)
    finally:
        process.kill()
    assert texts(bus, 0, 1) == [content(0)]
    assert bus.daemon.statistics()["abandoned_total"] == 1
    put(bus, 1)


def test_a_daemon_that_starts_again_need_not_wait_for_the_tool(make_bus: MakeBus) -> None:
    bus = make_bus("a")
    member = Member(bus.run_dir, "test")
    bus.stop()
    bus.start()
    assert bus.daemon.statistics()["unattached_holders"] == 2
    member.stay()
    assert bus.daemon.statistics()["unattached_holders"] == 1, "the test's own is left"
    member.close()


def test_a_disk_that_takes_no_more_leaves_no_file(make_bus: MakeBus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bus, file = make_bus("a"), tmp_path / "full.kv"
    put(bus, 1, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LENGTH, hard))
    try:
        assert cache(bus, "export", file) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "can't write" in capsys.readouterr().err
    assert not list(tmp_path.glob("full.kv*"))
    clean(bus)
    assert cache(bus, "export", tmp_path / "nowhere" / "x.kv") == 2
    assert cache(bus, "import", file) == 2
    assert "can't read" in capsys.readouterr().err


def test_without_a_cachebus_nothing_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.cache.member.ANSWER_MS_MAX", 100)
    assert main(["cache", "export", str(tmp_path / "x.kv"), "--set", f"cache.run_dir={tmp_path / 'none'}"]) == 2
    assert "no cachebus answers" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
