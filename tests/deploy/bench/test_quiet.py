"""The processor time of others, out of what the kernel tells."""

from __future__ import annotations

import os
import time

import pytest

from deploy.bench import quiet
from deploy.bench.quiet import Reading, busy_seconds, foreign_cores, process_seconds

SECOND = os.sysconf("SC_CLK_TCK")


def test_all_work_counts_and_waiting_does_not() -> None:
    user, nice, system, idle, iowait, irq, softirq, steal = (SECOND * seconds for seconds in (1, 2, 3, 1000, 500, 4, 5, 6))
    assert busy_seconds(f"cpu  {user} {nice} {system} {idle} {iowait} {irq} {softirq} {steal} 0 0\ncpu0 9 9\n") == 21


def test_a_process_may_be_called_anything() -> None:
    fields = ["S", *"0" * 10, str(2 * SECOND), str(3 * SECOND), *"0" * 30]
    assert process_seconds(f"17 (odd) name) {' '.join(fields)}\n") == 5


def test_others_are_what_is_left() -> None:
    assert foreign_cores(Reading(0, 100, 10), Reading(2, 104, 13)) == pytest.approx(0.5)
    assert foreign_cores(Reading(0, 100, 10), Reading(2, 101, 12)) == 0


def test_our_own_work_is_seen_as_our_own() -> None:
    before = quiet.read()
    deadline = time.process_time() + 0.2
    while time.process_time() < deadline:
        pass
    after = quiet.read()
    assert after.own_seconds - before.own_seconds >= 0.15
    assert after.busy_seconds - before.busy_seconds >= 0.15


def test_a_disturbed_measurement_is_repeated_and_the_quietest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(*foreign: float) -> tuple[int, bool, int]:
        # Two readings a try, a second apart; all work in between is foreign.
        busy, readings = 0.0, []
        for number, cores in enumerate(foreign):
            readings += [Reading(2 * number, busy, 0), Reading(2 * number + 1, busy + cores, 0)]
            busy += cores
        left = iter(readings)
        monkeypatch.setattr(quiet, "read", lambda: next(left))
        made: list[int] = []
        found, disturbed = quiet.quietest(lambda number: made.append(number) or number)
        return found, disturbed, len(made)

    assert tried(0.1) == (0, False, 1)
    assert tried(0.5, 0.1) == (1, False, 2)
    assert tried(0.9, 0.4, 0.6) == (1, True, quiet.TRIES_MAX)
