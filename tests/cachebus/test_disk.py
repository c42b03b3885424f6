"""The NVMe tier's files: what was committed comes back after any crash, nothing torn is ever taken for whole, and the cap holds."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from blake3 import blake3

from cachebus.chunk import HEADER_BYTES, ChunkHeader
from cachebus.disk import PAGE_BYTES, Disk, DiskTier
from cachebus.errors import TierError
from cachebus.extents import aligned
from cachebus.shelf import Shelf, Wanted
from cachebus.table import RECORD_BYTES, Record, State, pack_record

DIGEST_KEY, KEY_ID, LAYOUT = b"k" * 32, b"i" * 8, b"l" * 16
SIZE = 1 << 20


def memory(length: int) -> memoryview:
    return memoryview(mmap.mmap(-1, aligned(length)))


def chunk(number: int, length: int) -> tuple[ChunkHeader, memoryview]:
    payload = memory(length)
    payload[:length] = random.Random(number).randbytes(length)
    digest = blake3(payload[:length], key=DIGEST_KEY).digest()
    return ChunkHeader(number.to_bytes(32, "big"), LAYOUT, digest, length, KEY_ID), payload


def record(slot: int, offset: int, header: ChunkHeader, generation: int = 1) -> Record:
    return Record(State.COMMITTED, generation, offset, header.length, False, header.key, header.digest, header.layout, "")


def served(disk: Disk, wanted: Record, *, check: bool = True) -> bytes | None:
    """The chunk as a reader would take it: None unless header and digest are those of the record."""
    into = memory(wanted.length)
    found = disk.read(wanted.offset, wanted.length, into)
    payload = bytes(into[: wanted.length])
    same = found is not None and (found.key, found.layout, found.length, found.digest) == (wanted.key, LAYOUT, wanted.length, wanted.digest)
    good = same and blake3(payload, key=DIGEST_KEY).digest() == wanted.digest
    return payload if good or not check else None


def on_disk(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.iterdir())


@pytest.mark.parametrize("length", [1, PAGE_BYTES, 100_001])
def test_a_chunk_comes_back_from_another_life(tmp_path: Path, length: int) -> None:
    header, payload = chunk(1, length)
    disk = Disk(tmp_path / "d", SIZE, KEY_ID)
    assert not disk.adopted
    disk.write(3, record(3, 8192, header), header, payload)
    disk.sync()
    disk.close()
    disk = Disk(tmp_path / "d", SIZE, KEY_ID)
    assert disk.adopted
    assert disk.records() == [(3, record(3, 8192, header))]
    assert served(disk, record(3, 8192, header)) == bytes(payload[:length])
    disk.wipe(3)
    assert disk.records() == []
    disk.close()


def test_an_extent_may_lie_in_two_segments(tmp_path: Path) -> None:
    disk = Disk(tmp_path, SIZE, KEY_ID, segment_bytes=8 * PAGE_BYTES)
    header, payload = chunk(1, 9 * PAGE_BYTES - 5)
    place = record(0, 5 * PAGE_BYTES, header)
    disk.write(0, place, header, payload)
    assert served(disk, place) == bytes(payload[: header.length])
    assert sorted(path.name for path in tmp_path.glob("segment-*")) == ["segment-00000", "segment-00001"]
    disk.close()


def test_only_one_daemon_uses_a_folder(tmp_path: Path) -> None:
    disk = Disk(tmp_path, SIZE, KEY_ID)
    with pytest.raises(TierError, match="another cachebus uses"):
        Disk(tmp_path, SIZE, KEY_ID)
    disk.close()


@pytest.mark.parametrize(("size", "key_id"), [(2 * SIZE, KEY_ID), (SIZE, b"j" * 8)])
def test_a_store_of_another_size_or_digest_key_starts_empty(tmp_path: Path, size: int, key_id: bytes) -> None:
    header, payload = chunk(1, 5000)
    disk = Disk(tmp_path, SIZE, KEY_ID)
    disk.write(0, record(0, 0, header), header, payload)
    disk.close()
    disk = Disk(tmp_path, size, key_id)
    assert not disk.records()
    assert not list(tmp_path.glob("segment-*"))
    disk.close()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "d", SIZE, KEY_ID)
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / "d" / "segment-00000").symlink_to(target)
    header, payload = chunk(1, 5000)
    with pytest.raises(OSError, match="symbolic links"):
        disk.write(0, record(0, 0, header), header, payload)
    assert target.read_bytes() == b"precious"
    disk.close()


def test_the_cap_holds_at_every_moment(tmp_path: Path) -> None:
    disk = Disk(tmp_path, SIZE, KEY_ID, segment_bytes=1 << 16)
    shelf = Shelf(disk.capacity, disk.slots, header_bytes=PAGE_BYTES)
    dice = random.Random(3)
    for number in range(400):
        header, payload = chunk(number, dice.randrange(1, 60_000))
        entry, gone = shelf.place(Wanted(header.key, header.length, LAYOUT))
        for old in gone:
            disk.wipe(old.slot)
        assert entry is not None
        shelf.commit(entry, header.digest, number)
        disk.write(entry.slot, entry.record(), header, payload)
        assert on_disk(tmp_path) <= SIZE
    assert len(disk.records()) == len(shelf.index)
    assert shelf.used_bytes > 0.8 * shelf.capacity, "the control: it was full"
    disk.close()


def test_nothing_that_was_changed_in_the_file_is_accepted(tmp_path: Path) -> None:
    disk = Disk(tmp_path, SIZE, KEY_ID)
    header, payload = chunk(1, 20_000)
    place = record(0, 0, header)
    disk.write(0, place, header, payload)
    file = os.open(tmp_path / "segment-00000", os.O_RDWR)
    whole = os.pread(file, PAGE_BYTES + header.length, 0)
    for position in range(HEADER_BYTES):
        for bit in range(8):
            os.pwrite(file, bytes([whole[position] ^ 1 << bit]), position)
            assert served(disk, place) is None
        os.pwrite(file, whole[position : position + 1], position)
    assert served(disk, place) is not None
    dice, unchecked = random.Random(5), 0
    for _ in range(10_000):
        position = PAGE_BYTES + dice.randrange(header.length)
        os.pwrite(file, bytes([whole[position] ^ 1 << dice.randrange(8)]), position)
        assert served(disk, place) is None
        unchecked += served(disk, place, check=False) is not None if _ < 100 else 0
        os.pwrite(file, whole[position : position + 1], position)
    assert unchecked == 100, "the control: without the digest they would have been served"
    os.close(file)
    disk.close()


def test_a_hundred_thousand_chunks_open_in_time(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 100_000 * 300_000, KEY_ID)
    packed = [record(n, n * 8192, ChunkHeader(n.to_bytes(32, "big"), LAYOUT, b"d" * 32, 4096, KEY_ID), n) for n in range(100_000)]
    for slot, one in enumerate(packed):
        os.pwrite(disk._index, pack_record(one), slot * RECORD_BYTES)
    started = time.monotonic()
    shelf = Shelf(disk.capacity, disk.slots, header_bytes=PAGE_BYTES)
    assert shelf.adopt(disk.records()) == []
    assert time.monotonic() - started < 10
    assert len(shelf.index) == 100_000
    disk.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_that_can_not_be_written_is_read_only_until_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)
    try:
        disk = DiskTier(tmp_path, 4 << 20, KEY_ID, segment_bytes=512 << 10)
        header, payload = chunk(1, 5000)
        disk.write(0, record(0, 0, header), header, payload)
        with pytest.raises(OSError, match="No space"):
            disk.write(1, record(1, 1 << 20, header), header, payload)
        assert not disk.writable
        assert [slot for slot, _ in disk.records()] == [0]
        assert served(disk, record(0, 0, header)) == bytes(payload[:5000])
        monkeypatch.setattr("cachebus.disk.RETRY_SECONDS", 0)
        assert disk.writable
        disk.write(2, record(2, 8 * PAGE_BYTES, header), header, payload)
        assert not disk.read_only
        disk.close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# Crashes.


class Crashing(Disk):
    """A store that keeps a log of every write, so that its files can be made again as they were in the middle of any of them."""

    def __init__(self, folder: Path, log: list[tuple[str, int, bytes]]) -> None:
        super().__init__(folder, SIZE, KEY_ID)
        self.log = log

    def _transfer(self, offset: int, parts: Sequence[memoryview], *, writing: bool) -> None:
        if writing:
            self.log.append(("segment-00000", offset, b"".join(parts)))
        super()._transfer(offset, parts, writing=writing)

    def _write_record(self, slot: int, packed: bytes) -> None:
        self.log.append(("index", slot * len(packed), packed))
        super()._write_record(slot, packed)


def after_a_crash(folder: Path, log: list[tuple[str, int, bytes]], operations: int, bytes_of_last: int, lost: set[int]) -> None:
    files = {name: os.open(folder / name, os.O_RDWR | os.O_CREAT) for name in ("segment-00000", "index")}
    for number, (name, offset, content) in enumerate(log[: operations + 1]):
        if number in lost:
            continue
        os.pwrite(files[name], content if number < operations else content[:bytes_of_last], offset)
    for descriptor in files.values():
        os.close(descriptor)


def crash_rounds(folder: Path, rounds: int, seed: int, *, power: bool = False, check: bool = True) -> Iterator[tuple[bytes | None, bytes]]:
    """What a store serves after a crash in the middle of a random write, and what it should; one pair for each record.

    ``power``: the device lost power, too, and with it any of the last eight writes; then a miss is no fault.
    """
    dice = random.Random(seed)
    for number in range(rounds // 50):
        log: list[tuple[str, int, bytes]] = []
        home, copy = folder / f"{number}", folder / "copy"
        disk = Crashing(home, log)
        shelf = Shelf(20 * PAGE_BYTES, disk.slots, header_bytes=PAGE_BYTES)
        done: list[tuple[int, dict[bytes, bytes]]] = [(0, {})]
        for n in range(12):
            header, payload = chunk(dice.randrange(1 << 30), dice.randrange(1, 5 * PAGE_BYTES))
            entry, gone = shelf.place(Wanted(header.key, header.length, LAYOUT))
            assert entry is not None
            committed = dict(done[-1][1])
            for old in gone:
                committed.pop(old.key)
                done.append((len(log), dict(committed)))
                disk.wipe(old.slot)
            shelf.commit(entry, header.digest, n)
            disk.write(entry.slot, entry.record(), header, payload)
            committed[header.key] = bytes(payload[: header.length])
            done.append((len(log), committed))
        disk.close()
        for _ in range(50):
            shutil.rmtree(copy, ignore_errors=True)
            Disk(copy, SIZE, KEY_ID).close()
            operations = dice.randrange(len(log))
            lost = {n for n in range(operations - 8, operations) if dice.random() < 0.5} if power else set()
            after_a_crash(copy, log, operations, dice.randrange(len(log[operations][2]) + 1), lost)
            expected = {} if power else [contents for at, contents in done if at <= operations][-1]
            again = Disk(copy, SIZE, KEY_ID)
            found = {one.key: served(again, one, check=check) for _, one in again.records()}
            again.close()
            for key, content in expected.items():
                yield found.pop(key, None), content
            for key, content in found.items():
                if content is not None:
                    whole = next((contents[key] for _, contents in done if key in contents), b"")
                    yield content, whole
        shutil.rmtree(home)


def test_ten_thousand_crashes_lose_nothing_and_tear_nothing(tmp_path: Path) -> None:
    pairs = 0
    for found, expected in crash_rounds(tmp_path, 10_000, seed=11):
        assert found == expected
        pairs += 1
    assert pairs > 10_000


def test_a_power_cut_may_lose_chunks_and_tears_none(tmp_path: Path) -> None:
    assert all(found == expected for found, expected in crash_rounds(tmp_path, 2000, seed=12, power=True))


def test_without_the_digest_a_power_cut_would_be_noticed(tmp_path: Path) -> None:
    assert any(found != expected for found, expected in crash_rounds(tmp_path, 2000, seed=12, power=True, check=False))


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_disk import KEY_ID, LAYOUT, SIZE, chunk
from cachebus.disk import PAGE_BYTES, Disk
from cachebus.shelf import Shelf, Wanted
disk = Disk(Path({folder!r}), SIZE, KEY_ID)
shelf = Shelf(disk.capacity, disk.slots, header_bytes=PAGE_BYTES)
shelf.adopt(disk.records())
number = {start}
while True:
    header, payload = chunk(number, 1 + number * 7919 % 60_000)
    entry, gone = shelf.place(Wanted(header.key, header.length, LAYOUT))
    for old in gone:
        print("-", int.from_bytes(old.key, "big"), flush=True)
        disk.wipe(old.slot)
    shelf.commit(entry, header.digest, number)
    disk.write(entry.slot, entry.record(), header, payload)
    print("+", number, flush=True)
    number += 1
"""


def test_a_killed_writer_leaves_what_it_said_it_wrote(tmp_path: Path) -> None:
    said: set[int] = set()
    for life in range(5):
        code = WRITER.format(paths=[str(Path(__file__).parent), *sys.path], folder=str(tmp_path), start=life * 100_000)
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for line in itertools.islice(writer.stdout, 120 + 31 * life):
            sign, number = line.split()
            (said.add if sign == "+" else said.discard)(int(number))
        writer.send_signal(signal.SIGKILL)
        for line in writer.stdout.read().splitlines():
            sign, _, text = line.partition(" ")
            if text:
                (said.add if sign == "+" else said.discard)(int(text))
        writer.wait()
        disk = Disk(tmp_path, SIZE, KEY_ID)
        found = {int.from_bytes(one.key, "big"): served(disk, one) for _, one in disk.records()}
        disk.close()
        for number in said:
            assert found[number] == bytes(chunk(number, 1 + number * 7919 % 60_000)[1][: 1 + number * 7919 % 60_000])
