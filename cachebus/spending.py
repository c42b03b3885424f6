"""What tenants took of their limits, by router: told by the routers of this node, by other nodes of theirs, and learnt by asking those.

Plain tables. Every word is a count since some time, not what was added to it, so one that is lost, late or comes twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from cachebus.messages_routers import Spent

SILENCE_MS_MAX = 3000
ENTRIES_MAX = 8192
"""What one table holds and one answer says, each a tenant at a router; what is beyond is left out."""
BEGUN_ANEW_MS = 10_000
"""No word is as late as that: a count that is so much younger than the one before was begun anew."""

BySpender = Mapping[str, Mapping[str, Spent]]


def is_later(one: Spent, other: Spent) -> bool:
    """Whether ``one``, of the same router and tenant, was said after ``other``."""
    return one.age_ms > other.age_ms or other.age_ms - one.age_ms > BEGUN_ANEW_MS


class _Table:
    """By router and tenant, and when it was heard last."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], tuple[Spent, float]] = {}

    def take(self, spent: BySpender, now_ms: float) -> None:
        """Takes in what is not older than what is known."""
        for router, theirs in spent.items():
            for tenant, told in theirs.items():
                place = (router, tenant)
                known = self.entries.get(place)
                if known is not None and not is_later(told, known[0]):
                    self.entries[place] = (known[0], now_ms)
                elif known is not None or len(self.entries) < ENTRIES_MAX:
                    self.entries[place] = (told, now_ms)

    def end_silent(self, now_ms: float) -> None:
        """Forgets what nobody has said again for a while."""
        for place in [place for place, (_, at_ms) in self.entries.items() if now_ms - at_ms > SILENCE_MS_MAX]:
            del self.entries[place]


class Spending:
    """What is known of every router. ``now_ms`` is a monotonic clock."""

    def __init__(self) -> None:
        self._own, self._others, self._learnt = _Table(), _Table(), _Table()
        self._limiting: dict[str, float] = {}

    @property
    def wanted(self) -> bool:
        """Whether a router of this node has tenants with limits."""
        return bool(self._limiting)

    def tell(self, router: str, spent: Mapping[str, Spent], now_ms: float) -> None:
        """A router of this node tells its own."""
        self._limiting[router] = now_ms
        self._own.take({router: spent}, now_ms)

    def told_by_node(self, spent: BySpender, now_ms: float) -> None:
        """Another node tells what its routers told it."""
        self._others.take(self._of_others(spent), now_ms)

    def learn(self, spent: BySpender, now_ms: float) -> None:
        """What another node answered: of its own routers, and of those that others told it of."""
        self._learnt.take(self._of_others(spent), now_ms)

    def own(self, owner: Callable[[str], str | None]) -> dict[str | None, dict[str, dict[str, Spent]]]:
        """What routers of this node told, by the owner of each tenant."""
        shares: dict[str | None, list[tuple[tuple[str, str], Spent]]] = {}
        for place, (told, _) in self._own.entries.items():
            shares.setdefault(owner(place[1]), []).append((place, told))
        return {peer: _by_spender(share) for peer, share in shares.items()}

    def for_node(self, but: Collection[str]) -> dict[str, dict[str, Spent]]:
        """For another node: all that this one was told, but of those routers. What was learnt is not passed on."""
        return self._known((self._own, self._others), frozenset(but))

    def for_router(self, router: str) -> dict[str, dict[str, Spent]]:
        """For a router of this node: all that is known of others."""
        return self._known((self._own, self._others, self._learnt), (router,))

    def end_silent(self, now_ms: float) -> None:
        """Forgets routers, and what nobody has said again for a while."""
        for table in (self._own, self._others, self._learnt):
            table.end_silent(now_ms)
        for router in [router for router, at_ms in self._limiting.items() if now_ms - at_ms > SILENCE_MS_MAX]:
            del self._limiting[router]

    def _of_others(self, spent: BySpender) -> BySpender:
        """Nobody speaks for a router of this node."""
        return {router: theirs for router, theirs in spent.items() if router not in self._limiting}

    def _known(self, tables: Iterable[_Table], but: Collection[str]) -> dict[str, dict[str, Spent]]:
        found: dict[tuple[str, str], Spent] = {}
        for table in tables:
            for place, (told, _) in table.entries.items():
                if place[0] in but or (place not in found and len(found) >= ENTRIES_MAX):
                    continue
                if place not in found or is_later(told, found[place]):
                    found[place] = told
        return _by_spender(found.items())


def _by_spender(entries: Iterable[tuple[tuple[str, str], Spent]]) -> dict[str, dict[str, Spent]]:
    found: dict[str, dict[str, Spent]] = {}
    for (router, tenant), told in entries:
        found.setdefault(router, {})[tenant] = told
    return found
