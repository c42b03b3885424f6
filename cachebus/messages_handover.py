"""How an engine offers blocks of its own memory to engines of its node that wait for what it computes."""

from __future__ import annotations

from collections.abc import Iterable

from cachebus.errors import HandoverError
from cachebus.wire import Message


class SharedMemory(Message, frozen=True):
    """An engine's blocks as another process of the node reaches them.

    ``layers``: of each layer what opens the allocation that it lies in, and where in it block 0 begins. On a GPU (``device``: its UUID) that is
    a CUDA IPC handle and an offset; on a processor (``device``: the machine's boot) a process id and an address. ``holder`` is the engine's own:
    it ends with it. ``count`` blocks lie every ``stride_bytes``, ``page_bytes`` of each layer.
    """

    id: bytes
    holder: str
    layout: bytes
    device: str
    layers: list[tuple[bytes, int]]
    count: int
    stride_bytes: int
    page_bytes: int

    def check(self, blocks: Iterable[int]) -> None:
        """Raises HandoverError where one of ``blocks`` is not among these."""
        if any(not 0 <= block < self.count for block in blocks):
            raise HandoverError(f"a block of an engine with {self.count} blocks was offered that it does not have")


class OfferedEntry(Message, frozen=True):
    """A chunk, or a block of a prompt's end, that lies whole in these blocks now."""

    key: bytes
    digest: bytes
    blocks: list[int]


class Offer(Message, frozen=True):
    """Entries that may be read out of ``memory`` for the next ``valid_ms``; answered with nothing.

    It promises nothing: a block may be reused at any time, and the digest tells.
    """

    memory: SharedMemory
    entries: list[OfferedEntry]
    valid_ms: int


class Stale(Message, frozen=True):
    """What was read under these keys is not what was offered: the offers end; answered with nothing."""

    keys: list[bytes]


class Hold(Message, frozen=True):
    """The request that ``keys`` were computed for has ended, and its blocks are kept for who pulls from them.

    Answered with Done as soon as nobody waits for any of the keys or reads it, after ``wait_ms`` at the latest.
    """

    holder: str
    keys: list[bytes]
    wait_ms: int


HandoverRequest = Offer | Stale | Hold
"""What only engines ask."""
