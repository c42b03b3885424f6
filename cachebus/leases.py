"""Who reads what: leases on entries of DRAM. Plain bookkeeping; the entries count their readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachebus.shelf import Entry

LEASES_PER_EPOCH_BITS = 20


@dataclass(frozen=True)
class _Lease:
    holder: str
    entries: Sequence[Entry]
    acquire: tuple[bytes, int] | None


class Leases:
    """The leases of one life of the daemon, whose number ``epoch`` keeps theirs apart from those of other lives."""

    def __init__(self, epoch: int) -> None:
        self._leases: dict[int, _Lease] = {}
        self._number = epoch << LEASES_PER_EPOCH_BITS

    def grant(self, holder: str, entries: Sequence[Entry], acquire: tuple[bytes, int]) -> int:
        """A new lease's number; ``acquire`` is the client and the ticket that it answers."""
        self._number += 1
        self._hold(self._number, _Lease(holder, entries, acquire))
        return self._number

    def renew(self, number: int, holder: str, entries: Sequence[Entry]) -> None:
        """A lease that outlived the daemon that granted it; one that is known already stays as it is."""
        if entries and number not in self._leases:
            self._hold(number, _Lease(holder, entries, None))

    def end(self, number: int) -> Sequence[Entry]:
        """Ends a lease; its entries, each with one reader more than it has now, nothing where the lease is unknown."""
        lease = self._leases.pop(number, None)
        return lease.entries if lease else ()

    def of_holder(self, holder: str) -> list[int]:
        """The leases of a holder."""
        return [number for number, lease in self._leases.items() if lease.holder == holder]

    def of_acquire(self, acquire: tuple[bytes, int]) -> list[int]:
        """The lease that answered an acquire, if it has not ended."""
        return [number for number, lease in self._leases.items() if lease.acquire == acquire]

    def entries(self) -> list[Entry]:
        """All leased entries, once for each lease."""
        return [entry for lease in self._leases.values() for entry in lease.entries]

    def numbers(self) -> set[int]:
        """All leases."""
        return set(self._leases)

    def __len__(self) -> int:
        return len(self._leases)

    def _hold(self, number: int, lease: _Lease) -> None:
        self._leases[number] = lease
        for entry in lease.entries:
            entry.readers += 1
