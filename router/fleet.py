"""Which worker takes a leg: the one with the least of this router's requests. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from cachebus.messages import Worker
from cachebus.wire import Role


def candidates(workers: Iterable[Worker], role: Role, model: str | None, without: Collection[str] = ()) -> list[Worker]:
    """Those that may take a leg: of ``role``, serving ``model`` (None: any), not draining, none of ``without``."""
    return [w for w in workers if w.role == role and not w.draining and model in (None, w.model) and w.worker not in without]


class Fleet:
    """Requests in flight by worker. Ties go to the worker that was chosen longest ago."""

    def __init__(self) -> None:
        self.in_flight: Counter[str] = Counter()
        self._chosen_at: dict[str, int] = {}
        self._choices = 0

    def choose(self, workers: Iterable[Worker], role: Role, model: str | None, without: Collection[str] = ()) -> Worker | None:
        """A worker of ``role`` that serves ``model`` (None: any); None where there is none. ``without``: those that just failed."""
        able = candidates(workers, role, model, without)
        if not able:
            return None
        best = min(able, key=lambda w: (self.in_flight[w.worker], self._chosen_at.get(w.worker, -1), w.worker))
        self._choices += 1
        self._chosen_at[best.worker] = self._choices
        return best
