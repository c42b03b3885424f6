"""Which bytes of the region are free: first fit over a sorted free list, neighbours merged. Pure bookkeeping."""

from __future__ import annotations

from bisect import bisect_left

ALIGNMENT_BYTES = 4096
"""Extents start and end at multiples of this: what O_DIRECT and page-wise registration ask for."""


def aligned(length: int) -> int:
    """``length`` rounded up to whole pages."""
    return -(-length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Extents:
    """Free space of a region of ``size`` bytes. Offsets and lengths are bytes."""

    def __init__(self, size: int) -> None:
        self._starts = [0]
        self._sizes = [size // ALIGNMENT_BYTES * ALIGNMENT_BYTES]
        self.size = self._sizes[0]
        self.free_bytes = self.size

    def allocate(self, length: int) -> int | None:
        """Takes the first free run of ``length`` bytes (rounded up to pages); None where no run is long enough."""
        need = aligned(length)
        for index, size in enumerate(self._sizes):
            if size >= need:
                start = self._starts[index]
                if size == need:
                    del self._starts[index], self._sizes[index]
                else:
                    self._starts[index] += need
                    self._sizes[index] -= need
                self.free_bytes -= need
                return start
        return None

    def take(self, offset: int, length: int) -> bool:
        """Takes exactly this extent, as adopting a region does; False where part of it is not free."""
        need = aligned(length)
        index = bisect_left(self._starts, offset + 1) - 1
        if index < 0 or offset % ALIGNMENT_BYTES or offset + need > self._starts[index] + self._sizes[index]:
            return False
        start, end = self._starts[index], self._starts[index] + self._sizes[index]
        pieces = [(a, b - a) for a, b in ((start, offset), (offset + need, end)) if b > a]
        self._starts[index : index + 1] = [a for a, _ in pieces]
        self._sizes[index : index + 1] = [n for _, n in pieces]
        self.free_bytes -= need
        return True

    def release(self, offset: int, length: int) -> None:
        """Gives an extent back and merges it with its free neighbours."""
        size = aligned(length)
        index = bisect_left(self._starts, offset)
        assert index == len(self._starts) or offset + size <= self._starts[index], "extent freed twice"
        assert index == 0 or self._starts[index - 1] + self._sizes[index - 1] <= offset, "extent freed twice"
        self.free_bytes += size
        if index < len(self._starts) and offset + size == self._starts[index]:
            size += self._sizes[index]
            del self._starts[index], self._sizes[index]
        if index and self._starts[index - 1] + self._sizes[index - 1] == offset:
            self._sizes[index - 1] += size
        else:
            self._starts.insert(index, offset)
            self._sizes.insert(index, size)
