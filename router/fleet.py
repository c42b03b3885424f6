"""Which worker takes a leg: the one whose HBM has most of the prompt, or else the one with the least of this router's requests. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from cachebus.messages import Worker
from cachebus.wire import Role

BUSIER_MAX: dict[Role, int] = {"prefill": 0, "decode": 4}
"""How many requests more than the least busy worker one may have to be preferred for what its HBM holds.

A decode worker shares its steps among all that it has, so some more cost little; at a prefill worker each waits for those before it.
"""
_NONE: Mapping[str, int] = {}


def candidates(workers: Iterable[Worker], role: Role, model: str | None, without: Collection[str] = ()) -> list[Worker]:
    """Those that may take a leg: of ``role``, serving ``model`` (None: any), not draining, none of ``without``."""
    return [w for w in workers if w.role == role and not w.draining and model in (None, w.model) and w.worker not in without]


def warmest(able: Sequence[Worker], in_flight: Mapping[str, int], hbm_chunks: Mapping[str, int]) -> list[Worker]:
    """Those of ``able`` (of one role) with most of a prompt's chunks in HBM, among those that are not much busier than the least busy."""
    if not able:
        return []
    busiest = min(in_flight.get(w.worker, 0) for w in able) + BUSIER_MAX[able[0].role]
    near = [w for w in able if in_flight.get(w.worker, 0) <= busiest]
    most = max(hbm_chunks.get(w.worker, 0) for w in near)
    return [w for w in near if hbm_chunks.get(w.worker, 0) == most]


class Fleet:
    """Requests in flight by worker. Ties go to the worker that was chosen longest ago."""

    def __init__(self) -> None:
        self.in_flight: Counter[str] = Counter()
        self._chosen_at: dict[str, int] = {}
        self._choices = 0

    def choose(
        self,
        workers: Iterable[Worker],
        role: Role,
        model: str | None,
        without: Collection[str] = (),
        hbm_chunks: Mapping[str, int] = _NONE,
    ) -> Worker | None:
        """A worker of ``role`` that serves ``model`` (None: any); None where there is none.

        ``without``: those that just failed. ``hbm_chunks``: how many of the prompt's first chunks lie in whose HBM.
        """
        warm = warmest(candidates(workers, role, model, without), self.in_flight, hbm_chunks)
        if not warm:
            return None
        best = min(warm, key=lambda w: (self.in_flight[w.worker], self._chosen_at.get(w.worker, -1), w.worker))
        self._choices += 1
        self._chosen_at[best.worker] = self._choices
        return best
