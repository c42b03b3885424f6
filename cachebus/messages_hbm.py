"""What a worker's supervisor tells the bus of its engine's HBM, and what routers hear of it."""

from __future__ import annotations

from cachebus.wire import Message

HBM_KEYS_MAX = 1 << 15
"""Keys of one message, 1 MiB of them: 8 million tokens at 256 a chunk."""


class OpenHbm(Message, frozen=True):
    """Begins a supervisor's account of its engine's HBM, which counts as empty from then on. Refused to any but the worker's own ``holder``."""

    worker: str
    holder: str


class HbmOpened(Message, frozen=True):
    """Reply to OpenHbm: what the engine registered, so that its chunks can be named. Sizes in tokens."""

    namespace: bytes
    block_size: int
    chunk_size: int


class ReportHbm(Message, frozen=True):
    """Chunks that came into HBM, and that went from it, since the last report; refused where no account is open.

    ``gaps``: how often, since then, events of the engine were lost. A report without keys says that nothing has changed.
    """

    worker: str
    holder: str
    stored: list[bytes]
    removed: list[bytes]
    gaps: int = 0


class HbmChanged(Message, frozen=True):
    """An event: these chunks came into a worker's HBM, and those went. ``whole``: before ``stored`` it held nothing that is known."""

    worker: str
    stored: list[bytes]
    removed: list[bytes]
    whole: bool = False

    def change(self, held: set[bytes]) -> None:
        """Makes of what the worker held what it holds now."""
        if self.whole:
            held.clear()
        held.difference_update(self.removed)
        held.update(self.stored)


HbmRequest = OpenHbm | ReportHbm
