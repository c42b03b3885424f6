"""A simulated engine's KV blocks: who holds which, and the prefix cache that the free ones still are. Pure.

Works as vLLM's does: a block that nobody holds keeps its content until it is needed, the one that was let go first being taken first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deploy.sim.kv_events import KvEvents


class BlockPool:
    """Blocks 0 to ``count`` - 1."""

    def __init__(self, count: int, events: KvEvents) -> None:
        self._events = events
        self._holders = [0] * count
        self._hashes: dict[int, bytes] = {}
        self._by_hash: dict[bytes, int] = {}
        # A dict keeps the order in which blocks were let go.
        self._free: dict[int, None] = dict.fromkeys(range(count))

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def known(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest run of ``hashes``, from the first on, that are cached."""
        found: list[int] = []
        for name in hashes:
            block = self._by_hash.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def take(self, cached: Sequence[int], fresh: int) -> list[int] | None:
        """Holds the ``cached`` blocks and ``fresh`` others; None, and nothing changed, where there are too few."""
        if fresh > len(self._free) - sum(not self._holders[block] for block in cached):
            return None
        for block in cached:
            self._holders[block] += 1
            self._free.pop(block, None)
        taken = list(cached)
        for _ in range(fresh):
            block = next(iter(self._free))
            del self._free[block]
            self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def let_go(self, blocks: Sequence[int]) -> None:
        """One holder less for each of a request's blocks. Its end is given up first, since less begins like it."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, "a block was let go twice"
            if not self._holders[block]:
                self._free[block] = None

    def remember(self, block: int, name: bytes) -> bool:
        """A held block is full: it can be found under ``name`` until it is taken for something else; False where it could be already."""
        assert self._holders[block], "a block that nobody holds was filled"
        if block in self._hashes or name in self._by_hash:
            return False
        self._hashes[block] = name
        self._by_hash[name] = block
        return True

    def _forget(self, block: int) -> None:
        name = self._hashes.pop(block, None)
        if name is not None:
            del self._by_hash[name]
            self._events.removed(name)

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not agree."""
        assert all(not self._holders[block] for block in self._free)
        assert sum(not holders for holders in self._holders) == len(self._free)
        assert {name: block for block, name in self._hashes.items()} == self._by_hash
