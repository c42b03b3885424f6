"""What simulated workers share: the prefixes that somebody computed, up to a number of blocks, and how a worker pulls them. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from deploy.sim.kv_events import KvEvents
from deploy.sim.scheduler import Work


class Store:
    """Names of full blocks, the one that nobody asked for longest going first. All tiers as one, whatever their speed."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._names: OrderedDict[bytes, None] = OrderedDict()
        self.handed_over: set[str] = set()
        """Requests whose prompts a prefill worker has just computed: they are pulled whole, their last blocks too."""

    def known(self, names: Sequence[bytes]) -> int:
        """How many of the first names are there."""
        found = 0
        for name in names:
            if name not in self._names:
                break
            self._names.move_to_end(name)
            found += 1
        return found

    def publish(self, names: Iterable[bytes]) -> None:
        """They are there from now on."""
        for name in names:
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._blocks_max:
            self._names.popitem(last=False)


class StoreConnector:
    """A scheduler's connector to the store. ``pulls`` is told of every load that begins: the request, and how many tokens it brings."""

    def __init__(self, store: Store, block_size: int, pulls: Callable[[str, int], None]) -> None:
        self._store, self._block_size, self._pulls = store, block_size, pulls
        self.works: dict[str, Work] = {}

    def matched(self, request_id: str, local_tokens: int, now_ms: float, free_blocks: int) -> int:
        """Tokens after the local ones that the store has. The last token is computed all the same."""
        work = self.works[request_id]
        if request_id in self._store.handed_over:
            return max(0, len(work.tokens) - 1 - local_tokens)
        known = self._store.known(work.names[: (len(work.tokens) - 1) // self._block_size])
        return max(0, known * self._block_size - local_tokens)

    def allocated(self, request_id: str, blocks: Sequence[int], external_tokens: int) -> None:
        """Begins the pull."""
        if external_tokens:
            self._pulls(request_id, external_tokens)

    def loaded(self, request_ids: Sequence[str]) -> None:
        """What a pull brings is known to the engine's own blocks."""

    def finished(self, request_id: str, *, whole: bool = False) -> bool:
        """The request ended; nobody reads its blocks."""
        del self.works[request_id]
        return False


class Unheard(KvEvents):
    """KV cache events that nobody follows."""

    def stored(self, name: bytes, before: bytes | None, tokens: Sequence[int], salt: str) -> None:
        pass

    def removed(self, name: bytes) -> None:
        pass
