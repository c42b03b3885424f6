"""How workers do, by what becomes of legs and of calls to their /health, and which of them get nothing for a while. Pure: the time is passed in.

A breaker a worker: some failures in a row, or half of many, and it gets nothing for a second; failing again at once doubles that. One that is
silent altogether is lost until it answers again. Never is all of a pool (the workers of one role and model) passed over. A request that every
worker asked answers with a 5xx says nothing of them: one client's request could take all of them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cachebus.messages import Worker

FAILURES_MAX = 3
"""Failures in a row that open a breaker."""
SHARE_MAX, LEGS_MIN = 0.5, 10
"""Or the share of failures among so many legs of late (``_REMEMBERED_SECONDS``)."""
OUT_SECONDS, OUT_SECONDS_MAX = 1.0, 30.0
PROBES_MAX = 3
"""Calls to /health in a row that may fail."""
SILENT_SECONDS = 3.0
"""A worker that sent something in that time lives, whatever its /health does."""
PROBES_PER_SECOND_MAX = 20
_REMEMBERED_SECONDS = 30.0


@dataclass
class _Record:
    in_row: int = 0
    good: float = 0.0
    bad: float = 0.0
    at: float = 0.0
    out_until: float = -math.inf
    openings: int = 0
    probes_failed: int = 0
    probed_at: float = -math.inf

    def decay(self, now: float) -> None:
        kept = math.exp((self.at - now) / _REMEMBERED_SECONDS)
        self.good, self.bad, self.at = self.good * kept, self.bad * kept, now


class Health:
    """Everything known of the workers' health. ``heard``: when each last sent a piece of an answer."""

    def __init__(self) -> None:
        self.heard: dict[str, float] = {}
        self._records: dict[str, _Record] = {}

    def succeeded(self, worker: str, now: float) -> None:
        """A leg went well, or was refused for what it asked."""
        record = self._record(worker, now)
        record.good += 1
        record.in_row = 0
        if now >= record.out_until + record.openings * OUT_SECONDS:
            record.openings = 0

    def failed(self, worker: str, now: float) -> None:
        """A leg failed by the worker's fault."""
        record = self._record(worker, now)
        record.bad += 1
        record.in_row += 1
        legs = record.good + record.bad
        again = record.openings > 0 and record.good == 0
        if record.in_row >= FAILURES_MAX or again or (legs >= LEGS_MIN and record.bad >= SHARE_MAX * legs):
            record.out_until = now + min(OUT_SECONDS_MAX, OUT_SECONDS * 2**record.openings)
            record.openings += 1
            record.in_row, record.good, record.bad = 0, 0.0, 0.0

    def refused(self, workers: Iterable[str], now: float) -> None:
        """These answered with a 5xx what another worker then answered well."""
        for worker in workers:
            self.failed(worker, now)

    def probed(self, worker: str, now: float, *, well: bool) -> bool:
        """A call to its /health has ended. Whether the worker is lost."""
        record = self._record(worker, now)
        record.probes_failed = 0 if well else record.probes_failed + 1
        return self._is_lost(worker, now)

    def due(self, workers: Iterable[Worker], interval: float, now: float) -> list[Worker]:
        """Whose /health is to be called now: each once an ``interval`` (seconds), or less often where there are very many."""
        known = list(workers)
        names = {worker.worker for worker in known}
        for gone in self._records.keys() - names:
            del self._records[gone]
            self.heard.pop(gone, None)
        pace = max(interval, len(known) / PROBES_PER_SECOND_MAX)
        found = [worker for worker in known if now - self._record(worker.worker, now).probed_at >= pace]
        for worker in found:
            self._records[worker.worker].probed_at = now
        return found

    def usable(self, workers: Iterable[Worker], now: float) -> list[Worker]:
        """Those that may get something: without the lost ones, and without the failing ones as long as half of their pool is left."""
        known = list(workers)
        out = self.out(known, now)
        if not out:
            return known
        found = []
        pools: dict[tuple[str, str], list[Worker]] = {}
        for worker in known:
            pools.setdefault((worker.role, worker.model), []).append(worker)
        for pool in pools.values():
            lost = [w for w in pool if self._is_lost(w.worker, now)]
            failing = sorted((w for w in pool if w.worker in out and w not in lost), key=lambda w: self._records[w.worker].out_until)
            kept = [w for w in pool if w.worker not in out]
            # Those that come back soonest fill up the half.
            missing = math.ceil(len(pool) / 2) - len(kept)
            # All lost: what prefill workers can't do decode workers can; these are asked, and each leg ends with the next call to /health that fails.
            found += kept + failing[: max(0, missing)] or [w for w in pool if w.role == "decode"]
        return found

    def out(self, workers: Iterable[Worker], now: float) -> set[str]:
        """Those of them whose breaker is open or that are lost."""
        return {worker.worker for worker in workers if self._is_out(worker.worker, now)}

    def _is_out(self, worker: str, now: float) -> bool:
        record = self._records.get(worker)
        return record is not None and (now < record.out_until or self._is_lost(worker, now))

    def _is_lost(self, worker: str, now: float) -> bool:
        record = self._records.get(worker)
        return record is not None and record.probes_failed >= PROBES_MAX and now - self.heard.get(worker, -math.inf) > SILENT_SECONDS

    def _record(self, worker: str, now: float) -> _Record:
        record = self._records.setdefault(worker, _Record(at=now))
        record.decay(now)
        return record
