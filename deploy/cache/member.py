"""A tool that reads and writes the region as an engine does: it holds a lock, so what it had ends with it, however it ends."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TypeVar

from cachebus.client import BusClient
from cachebus.holder import Holder
from cachebus.messages import Ping, Pong, Reattach, Reply, Request
from cachebus.messages_tools import Chunks
from cachebus.region import Region
from deploy.cache import asking
from deploy.cache.asking import ANSWER_MS_MAX

_R = TypeVar("_R", bound=Reply)


class Member:
    """A connection, a holder's lock and the mapped region. Raises BusUnavailable where no cachebus answers, RegionError where it has no region."""

    def __init__(self, run_dir: Path, name: str) -> None:
        # Asked before the lock is taken, which would make folders where nobody is.
        asking = BusClient(run_dir, name)
        try:
            asking.call(Ping(), ANSWER_MS_MAX)
        finally:
            asking.close()
        self._holder = Holder(run_dir)
        self._client = BusClient(run_dir, name, self._holder)
        try:
            self.welcome = self._client.connect(ANSWER_MS_MAX)
            self.region = Region.map(Path(self.welcome.region_path))
        except BaseException:
            self._client.close()
            self._holder.close()
            raise
        self.digest_key = self.welcome.digest_key

    @property
    def holder(self) -> str:
        """The holder's name, for requests."""
        return self._holder.id

    def ask(self, request: Request, expected: type[_R]) -> _R:
        """The reply. Raises BusUnavailable where none comes in time."""
        return asking.ask(self._client, request, expected)

    def tell(self, request: Request) -> None:
        """Sends what has no reply, or none that matters."""
        self._client.submit(request)
        self._client.poll()

    def chunks(self) -> Chunks:
        """Every chunk of the node."""
        return asking.every_chunk(self._client)

    def stay(self) -> None:
        """Says to a daemon that was started again meanwhile that this holder has nothing open; until then it evicts nothing."""
        if not self.ask(Ping(self.holder), Pong).attached:
            self._client.call(Reattach(self.holder, {}, []), ANSWER_MS_MAX)

    def close(self) -> None:
        """Lets go of everything."""
        # An error on its way up may still hold a view of the region; the mapping then ends with the process.
        with contextlib.suppress(BufferError):
            self.region.close()
        self._client.close()
        self._holder.close()
