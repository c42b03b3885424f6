"""The NVMe tier's files: segments of chunks, written and read with O_DIRECT straight from and to the region, and an index of records.

``FOLDER/superblock`` says what the store is, ``index`` holds one record a slot (see ``cachebus.table``), ``segment-NNNNN`` hold the chunks: a page
with the header, then the payload, padded to pages. Which chunk lies where is decided elsewhere (``cachebus.shelf``).

A chunk's record is written after its bytes, so a process that is killed at any point leaves records of whole chunks only. A power cut may
take back what the device was not asked to keep yet (``sync``), in any order; the header's checksum and the payload's keyed digest, which every
reader checks, catch that.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

from cachebus.chunk import DIGEST_KEY_ID_BYTES, HEADER_BYTES, ChunkHeader, pack_header, unpack_header
from cachebus.errors import TierError
from cachebus.extents import aligned
from cachebus.table import FREE_RECORD, RECORD_BYTES, Record, pack_record, unpack_record

log = logging.getLogger("headstart.cachebus")

PAGE_BYTES = 4096
SEGMENT_BYTES = 1 << 30
RETRY_SECONDS = 30.0
_MAGIC = b"HSTDISK1"
_VERSION = 1
_SUPERBLOCK = struct.Struct(f"<8sIQQQ{DIGEST_KEY_ID_BYTES}s")
_SLOT_COVERS_BYTES = 256 * 1024
_SLOTS_MIN, _SLOTS_MAX = 64, 1 << 20
_RESERVED_PAGES = 8
"""For the superblock and what file systems add to files."""


class Disk:
    """A store of at most ``size`` bytes on disk, all files together, for chunks digested under the key that ``key_id`` names.

    Any thread may call. Raises TierError where the folder can't be used or another daemon uses it; every other call raises OSError.
    """

    def __init__(self, folder: Path, size: int, key_id: bytes, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder = folder
        self.slots = min(max(size // _SLOT_COVERS_BYTES, _SLOTS_MIN), _SLOTS_MAX)
        index_bytes = aligned(self.slots * RECORD_BYTES)
        self.capacity = (size - index_bytes - _RESERVED_PAGES * PAGE_BYTES) // PAGE_BYTES * PAGE_BYTES
        if self.capacity < 2 * PAGE_BYTES:
            raise TierError(f"cache.max_local_disk_size: {size} bytes leave no room for chunks in {folder}; give more")
        self._segment_bytes = min(segment_bytes, self.capacity)
        self._segments: dict[int, int] = {}
        self._opening = threading.Lock()
        self._header_pages = threading.local()
        self._direct = os.O_DIRECT
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = self._open("lock", 0)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            identity = _SUPERBLOCK.pack(_MAGIC, _VERSION, self.capacity, self._segment_bytes, self.slots, key_id)
            self.adopted = self._is(identity + crc32(identity).to_bytes(4, "little"))
            if not self.adopted:
                self._start_empty(identity + crc32(identity).to_bytes(4, "little"), index_bytes)
            self._index = self._open("index", 0)
        except BlockingIOError as error:
            raise TierError(f"cache.local_disk: another cachebus uses {folder}; give each its own folder") from error
        except OSError as error:
            raise TierError(f"cache.local_disk: can't use {folder}: {error.strerror}") from error

    def records(self) -> list[tuple[int, Record]]:
        """What the index holds, by slot."""
        packed = os.pread(self._index, self.slots * RECORD_BYTES, 0)
        found = ((slot, packed[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES]) for slot in range(len(packed) // RECORD_BYTES))
        return [(slot, record) for slot, raw in found if raw[:1] != b"\0" and (record := unpack_record(raw)) is not None]

    def write(self, slot: int, record: Record, header: ChunkHeader, payload: memoryview) -> None:
        """Writes a chunk at ``record.offset`` and then its record. ``payload`` is whole pages, of which ``header.length`` bytes count."""
        page = self._header_page()
        page[:HEADER_BYTES] = pack_header(header)
        self._transfer(record.offset, [page, payload], writing=True)
        self._write_record(slot, pack_record(record))

    def wipe(self, slot: int) -> None:
        """Frees a record."""
        self._write_record(slot, FREE_RECORD)

    def read(self, offset: int, length: int, into: memoryview) -> ChunkHeader | None:
        """Reads a chunk of ``length`` bytes into whole pages of memory; the header found before it, None where there is no whole one."""
        page = self._header_page()
        self._transfer(offset, [page, into[: aligned(length)]], writing=False)
        return unpack_header(bytes(page[:HEADER_BYTES]))

    def sync(self) -> None:
        """Has the device keep what was written."""
        for descriptor in [*self._segments.values(), self._index]:
            os.fdatasync(descriptor)

    def close(self) -> None:
        """Closes all files."""
        for descriptor in [*self._segments.values(), self._index, self._lock]:
            os.close(descriptor)

    def _write_record(self, slot: int, packed: bytes) -> None:
        os.pwrite(self._index, packed, slot * RECORD_BYTES)

    def _transfer(self, offset: int, parts: Sequence[memoryview], *, writing: bool) -> None:
        """Moves pages between memory and the segments that the extent lies in."""
        while parts:
            number, start = divmod(offset, self._segment_bytes)
            room = self._segment_bytes - start
            now = _first(parts, room)
            descriptor = self._segment(number)
            moved = os.pwritev(descriptor, now, start) if writing else os.preadv(descriptor, now, start)
            if moved <= 0 or moved % PAGE_BYTES:
                raise OSError(errno.EIO, f"{moved} bytes moved at {offset}")
            offset += moved
            parts = _after(parts, moved)

    def _segment(self, number: int) -> int:
        descriptor = self._segments.get(number)
        if descriptor is not None:
            return descriptor
        with self._opening:
            if number not in self._segments:
                size = min(self._segment_bytes, self.capacity - number * self._segment_bytes)
                descriptor = self._open_direct(f"segment-{number:05d}")
                try:
                    if os.fstat(descriptor).st_size != size:
                        # The blocks are taken now, so that a full disk shows here and not in the middle of a chunk.
                        os.posix_fallocate(descriptor, 0, size)
                except OSError:
                    os.close(descriptor)
                    (self._folder / f"segment-{number:05d}").unlink()
                    raise
                self._segments[number] = descriptor
            return self._segments[number]

    def _open_direct(self, name: str) -> int:
        try:
            return self._open(name, self._direct)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
        log.warning("nvme: %s has no O_DIRECT: chunks take the way through the page cache, which costs memory and time", self._folder)
        self._direct = 0
        return self._open(name, 0)

    def _open(self, name: str, flags: int) -> int:
        return os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)

    def _is(self, superblock: bytes) -> bool:
        path = self._folder / "superblock"
        found = path.read_bytes() if path.exists() else b""
        if found and found != superblock:
            log.warning("nvme: %s was made with another size, version or digest key: it starts empty", self._folder)
        return found == superblock

    def _start_empty(self, superblock: bytes, index_bytes: int) -> None:
        for path in self._folder.iterdir():
            if path.name in ("superblock", "index") or path.name.startswith("segment-"):
                path.unlink()
        descriptor = self._open("index", 0)
        try:
            os.posix_fallocate(descriptor, 0, index_bytes)
        finally:
            os.close(descriptor)
        made = self._folder / "superblock.new"
        made.write_bytes(superblock)
        made.rename(self._folder / "superblock")

    def _header_page(self) -> memoryview:
        """A page of this thread's own, aligned as O_DIRECT asks for."""
        page = getattr(self._header_pages, "page", None)
        if page is None:
            page = self._header_pages.page = memoryview(mmap.mmap(-1, PAGE_BYTES))
        return page


class DiskTier(Disk):
    """A store that goes read-only where writing fails, says so, and tries again every half minute."""

    def __init__(self, folder: Path, size: int, key_id: bytes, segment_bytes: int = SEGMENT_BYTES) -> None:
        super().__init__(folder, size, key_id, segment_bytes)
        self._failed_at: float | None = None
        self.counts = {"read_bytes": 0, "written_bytes": 0, "read_errors": 0, "write_errors": 0}

    @property
    def writable(self) -> bool:
        """Whether writing makes sense now: it never failed, or so long ago that it is worth another try."""
        return self._failed_at is None or time.monotonic() - self._failed_at > RETRY_SECONDS

    @property
    def read_only(self) -> bool:
        """Whether the last write failed."""
        return self._failed_at is not None

    def write(self, slot: int, record: Record, header: ChunkHeader, payload: memoryview) -> None:
        try:
            super().write(slot, record, header, payload)
        except OSError as error:
            self._alarm(error)
            raise
        if self._failed_at is not None:
            log.warning("nvme: %s can be written again", self._folder)
            self._failed_at = None
        self.counts["written_bytes"] += header.length

    def wipe(self, slot: int) -> None:
        try:
            super().wipe(slot)
        except OSError as error:
            self._alarm(error)
            raise

    def read(self, offset: int, length: int, into: memoryview) -> ChunkHeader | None:
        try:
            header = super().read(offset, length, into)
        except OSError:
            self.counts["read_errors"] += 1
            raise
        self.counts["read_bytes"] += length
        return header

    def _alarm(self, error: OSError) -> None:
        if self._failed_at is None:
            log.error("nvme: %s can't be written (%s): the tier is read-only until that ends", self._folder, error.strerror)
        self._failed_at = time.monotonic()
        self.counts["write_errors"] += 1


def _first(parts: Sequence[memoryview], length: int) -> list[memoryview]:
    """The first ``length`` bytes."""
    found = []
    for part in parts:
        if length <= 0:
            break
        found.append(part[:length])
        length -= len(part)
    return found


def _after(parts: Sequence[memoryview], length: int) -> list[memoryview]:
    """What comes after the first ``length`` bytes."""
    left = []
    for part in parts:
        if length < len(part):
            left.append(part[length:])
        length = max(0, length - len(part))
    return left
