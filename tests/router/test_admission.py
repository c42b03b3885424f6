"""Who runs, who waits and who is refused, on a clock of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from router.admission import Admission, Full, Ticket

NEVER = 1e9


def full(admission: Admission, priority: int = 0, deadline: float = NEVER, limit: int = 1, now: float = 0) -> int:
    with pytest.raises(Full) as refused:
        admission.arrive(priority, deadline, limit, now)
    return refused.value.seconds


def test_higher_priorities_go_first_and_equals_in_turn() -> None:
    admission = Admission(10, 100)
    running, _ = admission.arrive(0, NEVER, 1, 0)
    low, first, second, high = (admission.arrive(priority, NEVER, 1, 0)[0] for priority in (-1, 0, 0, 5))
    order = []
    for _ in range(4):
        admission.leave(running, 1, well=True)
        ((running,), lost) = admission.begin(1, 1)
        order.append(running)
        assert lost == []
    assert order == [high, first, second, low]


def test_a_full_queue_gives_the_last_place_of_the_lowest_priority_to_a_higher_one() -> None:
    admission = Admission(2, 100)
    admission.arrive(0, NEVER, 1, 0)
    first, second = (admission.arrive(0, NEVER, 1, 0)[0] for _ in range(2))
    full(admission)
    with pytest.raises(Full):
        admission.check(0, 1)
    admission.check(1, 1)
    _, lost = admission.arrive(1, NEVER, 1, 0)
    assert lost is second
    _, lost = admission.arrive(1, NEVER, 1, 0)
    assert lost is first
    full(admission, 1)


def busy(interval: float, service: float) -> Admission:
    """One that has learnt that answers take so long, and that one ends every ``interval``."""
    admission, now = Admission(1000, 50), 0.0
    running = [admission.arrive(0, NEVER, 2, 0)[0] for _ in range(500)]
    for ticket in running[:400]:
        now += interval
        ticket.began = now - service
        admission.leave(ticket, now, well=True)
        admission.begin(2, now)
    return admission


def test_who_could_not_be_answered_in_time_is_refused_at_once() -> None:
    admission = busy(0.1, 1.0)
    assert admission.waiting == 98
    # A hundred are before it, so it would begin in ten seconds, or twelve with a margin.
    now = 40.0
    assert full(admission, deadline=now + 12.5, limit=2, now=now) == 10
    admission.arrive(0, now + 13.5, 2, now)
    admission.arrive(9, now + 1.5, 2, now)
    full(admission, 9, deadline=now + 1, limit=2, now=now)


def test_who_waited_too_long_is_let_go_and_the_next_one_runs() -> None:
    admission = busy(0.1, 1.0)
    late, _ = admission.arrive(1, 42.0, 2, 40.0)
    begun, lost = admission.begin(3, 41.5)
    assert lost == [late]
    assert len(begun) == 1
    begun, lost = admission.begin(3, 1e6)
    assert (len(begun), len(lost)) == (0, 97)


def test_one_that_leaves_before_its_turn_takes_nothing_along() -> None:
    admission = Admission(10, 100)
    admission.arrive(0, NEVER, 1, 0)
    waiting, _ = admission.arrive(0, NEVER, 1, 0)
    admission.leave(waiting, 1, well=False)
    admission.leave(waiting, 1, well=False)
    assert (admission.running, admission.waiting) == (1, 0)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_nobody_is_lost_and_no_more_run_than_may(seed: int) -> None:
    chance, now = random.Random(seed), 0.0
    admission, limit = Admission(chance.randint(0, 6), 5.0), chance.randint(1, 4)
    running: list[Ticket] = []
    waiting: set[Ticket] = set()
    for _ in range(2000):
        now += chance.random() * 0.3
        if chance.random() < 0.6:
            try:
                ticket, lost = admission.arrive(chance.randint(-2, 2), now + chance.random() * 8, limit, now)
            except Full as refused:
                assert refused.seconds >= 1
            else:
                waiting.discard(lost or ticket)
                (running.append if ticket.began is not None else waiting.add)(ticket)
        for ticket in leaving(chance, running, waiting):
            admission.leave(ticket, now, well=chance.random() < 0.8)
        begun, lost_now = admission.begin(limit, now)
        waiting -= {*begun, *lost_now}
        running += begun
        assert admission.running == len(running) <= limit
        assert admission.waiting == len(waiting)
        assert not waiting or len(running) == limit, "a place is free and somebody waits"


def leaving(chance: random.Random, running: list[Ticket], waiting: set[Ticket]) -> Iterator[Ticket]:
    if running and chance.random() < 0.4:
        yield running.pop(chance.randrange(len(running)))
    if waiting and chance.random() < 0.1:
        ticket = min(waiting, key=lambda one: one.number)
        waiting.remove(ticket)
        yield ticket
