"""Who runs now, who waits and who is refused, so that what is begun can be finished in time. Pure: the time is passed in.

At most so many run as the workers take at once. Others wait, higher priorities first. Nobody waits who could not be answered before its deadline,
judged by how fast those before it leave and how long answers take: it is refused at once, and hears when to come again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_LEARNT = 0.05
"""What one answer counts in the averages of how long they take."""
_PACE_SECONDS, _PACE_MIN = 10.0, 20.0
"""Over how long departures are counted (engines let go of whole batches at once), and how many it takes to believe them."""
_DEVIATIONS = 2.0
_WAIT_MARGIN = 1.2
RETRY_SECONDS_MAX = 60


class Full(Exception):
    """Refused; ``seconds``: when it may be tried again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"full for {seconds} s")
        self.seconds = seconds


@dataclass(eq=False)
class Ticket:
    """A request. ``priority``: higher ones first; ``deadline``: when it must have ended; ``began``: None while it waits."""

    priority: int
    deadline: float
    number: int
    arrived: float
    began: float | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Sorts those that go first first."""
        return -self.priority, self.number


class Admission:
    """``waiting_max`` may wait, none longer than ``seconds_max``."""

    def __init__(self, waiting_max: int, seconds_max: float) -> None:
        self._waiting_max, self._seconds_max = waiting_max, seconds_max
        self.running = 0
        self._waiting: list[Ticket] = []
        self._count = 0
        # How long others waited lately while so many left; how long answers take, and how much they differ.
        self._full = self._left = self._service = self._deviation = 0.0
        self._left_at: float | None = None

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def check(self, priority: int, limit: int) -> None:
        """Raises Full where a request of that priority would be refused whatever it is, so that nothing need be read of it."""
        if self.running >= limit and len(self._waiting) >= self._waiting_max and not self._worse(priority):
            raise Full(self._retry())

    def arrive(self, priority: int, deadline: float, limit: int, now: float) -> tuple[Ticket, Ticket | None]:
        """A request has come, of which ``limit`` may run: its ticket, and one that lost its place to it. Raises Full."""
        self._count += 1
        ticket = Ticket(priority, deadline, self._count, now)
        if self.running < limit and not self._waiting:
            self._begin(ticket, now)
            return ticket, None
        before = sum(other.place < ticket.place for other in self._waiting)
        wait = (before + 1) * self._pace() * _WAIT_MARGIN
        if wait > self._seconds_max or now + wait + self._takes() > deadline:
            raise Full(self._retry())
        lost = None
        if len(self._waiting) >= self._waiting_max:
            lost = self._worse(priority)
            if lost is None:
                raise Full(self._retry())
            self._waiting.remove(lost)
        self._waiting.append(ticket)
        return ticket, lost

    def begin(self, limit: int, now: float) -> tuple[list[Ticket], list[Ticket]]:
        """Who runs from now on of those that wait, and who waited in vain: there is not enough time left for it."""
        begun, lost = [], []
        for ticket in sorted(self._waiting, key=lambda waiting: waiting.place):
            # More sparing than on arrival: it has waited for its turn, and what is thought of its time has moved meanwhile.
            late = now - ticket.arrived > self._seconds_max or now + self._service > ticket.deadline
            if not late and self.running >= limit:
                continue
            self._waiting.remove(ticket)
            if late:
                lost.append(ticket)
            else:
                self._begin(ticket, now)
                begun.append(ticket)
        return begun, lost

    def leave(self, ticket: Ticket, now: float, *, well: bool) -> None:
        """It has ended, ``well`` or not, or waits no longer."""
        if ticket.began is None:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            return
        self.running -= 1
        if self._waiting and self._left_at is not None:
            passed = now - self._left_at
            kept = math.exp(-passed / _PACE_SECONDS)
            self._full, self._left = self._full * kept + passed, self._left * kept + 1
        self._left_at = now if self._waiting else None
        if well:
            took = now - ticket.began
            learnt = _LEARNT if self._service else 1.0
            self._deviation += (abs(took - self._service) - self._deviation) * _LEARNT if self._service else 0.0
            self._service += (took - self._service) * learnt

    def _begin(self, ticket: Ticket, now: float) -> None:
        ticket.began = now
        self.running += 1

    def _pace(self) -> float:
        """Seconds between two departures; before enough were seen while others waited: as if the places were taken in turn."""
        return self._full / self._left if self._left >= _PACE_MIN else self._service / max(1, self.running)

    def _takes(self) -> float:
        return self._service + _DEVIATIONS * self._deviation

    def _worse(self, priority: int) -> Ticket | None:
        """Who would give its place to that priority: the last one of the lowest."""
        last = max(self._waiting, key=lambda waiting: waiting.place, default=None)
        return last if last is not None and last.priority < priority else None

    def _retry(self) -> int:
        return max(1, min(RETRY_SECONDS_MAX, math.ceil(len(self._waiting) * self._pace())))
