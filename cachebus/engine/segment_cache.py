"""Token ids of text segments that were tokenised before: as many bytes of them as there is room for, those used longest ago go first. Pure."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.uint32]

ENTRY_BYTES = 256
"""What an entry takes beside its ids: the name, the array's header, a place in the dictionary (measured with CPython 3.11)."""


class SegmentCache:
    """Safe to use by several threads."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max, self._bytes = bytes_max, 0
        self._entries: OrderedDict[bytes, TokenIds] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, names: Sequence[bytes]) -> list[TokenIds | None]:
        """The ids of each segment, None where they are not known."""
        with self._lock:
            found = [self._entries.get(name) for name in names]
            for name, ids in zip(names, found, strict=True):
                if ids is not None:
                    self._entries.move_to_end(name)
        return found

    def add(self, name: bytes, ids: TokenIds) -> None:
        """Keeps a segment's ids; those that alone exceed the room are not kept."""
        size = ids.nbytes + ENTRY_BYTES
        if size > self._bytes_max:
            return
        with self._lock:
            if name in self._entries:
                return
            self._entries[name] = ids
            self._bytes += size
            while self._bytes > self._bytes_max:
                _, oldest = self._entries.popitem(last=False)
                self._bytes -= oldest.nbytes + ENTRY_BYTES

    def clear(self) -> None:
        """Forgets all."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def statistics(self) -> dict[str, int]:
        """Segments and bytes held."""
        with self._lock:
            return {"segments": len(self._entries), "bytes": self._bytes}
