"""The node's shared memory region: the DRAM tier's bytes, mapped by the daemon and by every worker of the node.

A file (in /dev/shm unless told otherwise) of one page of superblock, the table (see ``cachebus.table``) and the data.
The daemon makes it, faults it in and alone writes its head; workers write and read extents of the data that the
daemon gave them. It outlives every process, so a new daemon adopts it with all that is committed in it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from pathlib import Path
from zlib import crc32

from cachebus.errors import RegionError
from cachebus.table import RECORD_BYTES, Table

PAGE_BYTES = 4096
_MAGIC = b"HEADSTRT"
_VERSION = 2
_SUPERBLOCK = struct.Struct("<8sIIQQQ")
_SLOT_COVERS_BYTES = 32 * 1024
_SLOTS_MIN, _SLOTS_MAX = 1024, 1 << 20
_MADV_POPULATE_WRITE = 23


class Region:
    """A mapped region. ``data`` is the part that holds extents; offsets on the bus count from its start."""

    def __init__(self, path: Path, memory: mmap.mmap, *, adopted: bool) -> None:
        self.path = path
        self.adopted = adopted
        self._memory = memory
        self._whole = memoryview(memory)
        data_start, data_bytes, slots = _read_superblock(self._whole, path)
        self.table = Table(self._whole[PAGE_BYTES : PAGE_BYTES + slots * RECORD_BYTES])
        self.data = self._whole[data_start : data_start + data_bytes]
        self.data_bytes = data_bytes

    @classmethod
    def make_or_adopt(cls, path: Path, size: int, *, may_replace: bool) -> Region:
        """Maps the region at ``path`` with ``size`` bytes in all, made new where there is none that fits.

        ``may_replace``: whether a region of another size or version may be thrown away (nobody maps it any more).
        Raises RegionError where the file system has too little room, or where the old region may not be replaced.
        """
        if path.exists():
            try:
                region = cls.map(path)
            except RegionError as error:
                if not may_replace:
                    raise RegionError(f"{error}, and living workers still map it: stop them first") from error
            else:
                if len(region._whole) == size:
                    region.adopted = True
                    return region
                region.close()
                if not may_replace:
                    raise RegionError(
                        f"{path} has another size than cache.max_local_cpu_size now asks for, and living workers still map it: "
                        "stop the workers first, or set the size back"
                    )
            path.unlink()
        return cls._make(path, size)

    @classmethod
    def _make(cls, path: Path, size: int) -> Region:
        _check_room(path, size)
        slots = min(max(size // _SLOT_COVERS_BYTES, _SLOTS_MIN), _SLOTS_MAX)
        data_start = -(-(PAGE_BYTES + slots * RECORD_BYTES) // PAGE_BYTES) * PAGE_BYTES
        if size < data_start + PAGE_BYTES:
            raise RegionError(f"cache.max_local_cpu_size: {size} bytes is too small for a region; give at least {2 * data_start} bytes")
        made = path.with_suffix(".new")
        descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            # The blocks are taken now: a region that runs out of memory later kills its writers with SIGBUS.
            os.posix_fallocate(descriptor, 0, size)
            memory = mmap.mmap(descriptor, size)
            _populate(memory)
            packed = _SUPERBLOCK.pack(_MAGIC, _VERSION, slots, size, data_start, size - data_start)
            memory[: len(packed) + 4] = packed + crc32(packed).to_bytes(4, "little")
            os.rename(made, path)
        except OSError as error:
            os.unlink(made)
            raise RegionError(f"can't make a region of {size} bytes at {path}: {error.strerror}; lower cache.max_local_cpu_size") from error
        finally:
            os.close(descriptor)
        return cls(path, memory, adopted=False)

    @classmethod
    def map(cls, path: Path) -> Region:
        """Maps an existing region, as workers do. Raises RegionError where it is missing or not a region."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise RegionError(f"can't open the region {path}: {error.strerror}") from error
        try:
            size = os.fstat(descriptor).st_size
            if size < PAGE_BYTES:
                raise RegionError(f"{path} is not a region: {size} bytes")
            memory = mmap.mmap(descriptor, size)
            _populate(memory)
            return cls(path, memory, adopted=False)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Unmaps the region; the file stays. Every view taken of ``data`` must be gone."""
        self.data.release()
        self.table.close()
        self._whole.release()
        self._memory.close()


def _read_superblock(whole: memoryview, path: Path) -> tuple[int, int, int]:
    packed = bytes(whole[: _SUPERBLOCK.size])
    magic, version, slots, size, data_start, data_bytes = _SUPERBLOCK.unpack(packed)
    checksum = int.from_bytes(whole[_SUPERBLOCK.size : _SUPERBLOCK.size + 4], "little")
    if magic != _MAGIC or checksum != crc32(packed) or version != _VERSION or size != len(whole):
        raise RegionError(f"{path} is no region of this version of Headstart")
    return data_start, data_bytes, slots


def _check_room(path: Path, size: int) -> None:
    room = os.statvfs(path.parent)
    free = room.f_bavail * room.f_frsize
    if size > free:
        raise RegionError(
            f"cache.max_local_cpu_size asks for {size / 1e9:.2f} GB, but {path.parent} has {free / 1e9:.2f} GB free: "
            "lower it, or enlarge the file system (mount -o remount,size=... /dev/shm; --shm-size in a container)"
        )


def _populate(memory: mmap.mmap) -> None:
    """Maps every page now, so that no copy pays for a page fault; kernels before 5.14 can't, and fault page by page."""
    with contextlib.suppress(OSError):
        memory.madvise(_MADV_POPULATE_WRITE)
