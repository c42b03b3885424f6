import msgspec
import pytest

from cachebus.messages import Worker
from cachebus.messages_routers import WorkerLoad
from router.costs import Load, Pool
from router.fleet import Fleet, candidates


def worker(name: str, role: str = "decode", model: str = "m", *, draining: bool = False) -> Worker:
    return Worker(name, role, "http://x", model, b"n" * 32, 16, 256, 8192, True, draining)  # type: ignore[arg-type]


def test_who_may_take_a_leg() -> None:
    able = worker("a")
    others = [worker("b", "prefill"), worker("c", model="other"), worker("d", draining=True), worker("e")]
    assert candidates([able, *others], "decode", "m", {"e"}) == [able]
    assert [w.worker for w in candidates([able, *others], "decode", None)] == ["a", "c", "e"]
    assert msgspec.structs.replace(able, draining=True) not in candidates([msgspec.structs.replace(able, draining=True)], "decode", "m")


def test_prompts_are_computed_one_after_the_other() -> None:
    fleet, one = Fleet(), worker("a", "prefill")
    assert fleet.load("a", 0.0).backlog == 0.0
    first = fleet.begin(one, 2.0, 0.0)
    second = fleet.begin(one, 3.0, 1.0)
    assert fleet.load("a", 1.0).backlog == pytest.approx(4.0)
    assert fleet.load("a", 2.0).backlog == pytest.approx(3.0)
    # The first takes longer than was told: the second begins now at the earliest.
    assert fleet.load("a", 2.5).backlog == pytest.approx(3.0)
    fleet.end(first, 2.5)
    assert fleet.load("a", 3.5).backlog == pytest.approx(2.0)
    fleet.end(second, 3.0)
    assert fleet.load("a", 3.0) == Load()
    assert fleet.in_flight["a"] == 0


def test_the_backlog_that_scales_the_prefill_pool() -> None:
    fleet, prefill, decode = Fleet(), [worker("p0", "prefill"), worker("p1", "prefill")], worker("d")
    workers = [*prefill, decode]
    assert fleet.prefill_backlog(workers, 0.0) == 0.0
    fleet.begin(prefill[0], 2.0, 0.0)
    fleet.begin(prefill[1], 3.0, 0.0)
    fleet.begin(decode, 4.0, 0.0)
    assert fleet.prefill_backlog(workers, 1.0) == pytest.approx(1.0 + 2.0)
    # Scaled to nothing, or all of it draining: what decode workers compute instead is what wants a prefill worker.
    assert fleet.prefill_backlog([decode], 1.0) == pytest.approx(3.0)
    draining = [msgspec.structs.replace(one, draining=True) for one in prefill]
    assert fleet.prefill_backlog([*draining, decode], 1.0) == pytest.approx(3.0)


def test_what_other_routers_have_is_theirs_to_tell() -> None:
    fleet, one = Fleet(), worker("p", "prefill")
    fleet.others = lambda: {"p": WorkerLoad(1, 0, 5.0)}
    fleet.begin(one, 2.0, 0.0)
    assert fleet.prefill_backlog([one], 0.0) == pytest.approx(2.0)


def test_an_idle_time_between_two_prompts_is_not_worked_off_before() -> None:
    fleet, one = Fleet(), worker("a", "prefill")
    fleet.end(fleet.begin(one, 1.0, 0.0), 1.0)
    fleet.begin(one, 1.0, 5.0)
    assert fleet.load("a", 5.5).backlog == pytest.approx(0.5)


def test_who_generates_is_no_backlog() -> None:
    fleet, one = Fleet(), worker("a")
    leg = fleet.begin(one, 2.0, 0.0)
    assert (fleet.load("a", 0.0).backlog, fleet.load("a", 0.0).running) == (2.0, 0)
    fleet.token(leg, 1.0)
    assert (fleet.load("a", 1.0).backlog, fleet.load("a", 1.0).running) == (0.0, 1)


def test_a_pools_utilisation_is_what_it_was_given_lately() -> None:
    fleet, one = Fleet(), worker("a", "prefill")
    for second in range(100):
        fleet.end(fleet.begin(one, 0.5, float(second)), second + 0.5)
    idle = Load()
    assert fleet.pool("prefill", [idle], 100.0).utilisation == pytest.approx(0.5, abs=0.05)
    assert fleet.pool("prefill", [idle, idle], 100.0).utilisation == pytest.approx(0.25, abs=0.03)
    assert fleet.pool("prefill", [idle], 160.0).utilisation < 0.01
    assert fleet.pool("decode", [idle], 100.0) == Pool()


def test_a_pool_is_told_how_many_come_and_what_is_before_them() -> None:
    fleet, one = Fleet(), worker("a")
    for tenth in range(1000):
        fleet.end(fleet.begin(one, 0.0, tenth / 10), tenth / 10)
    pool = fleet.pool("decode", [Load(3.0), Load(1.0)], 100.0)
    assert pool.arrivals == pytest.approx(10, rel=0.05)
    assert (pool.workers, pool.backlog, pool.utilisation) == (2, 2.0, 0.0)
    assert fleet.pool("decode", [], 160.0).arrivals < 0.1


def test_what_one_more_costs_a_batch_is_learnt_from_answers() -> None:
    """Tokens come every 10 ms alone, and 2 ms later for each one beside."""
    fleet, one = Fleet(), worker("a")
    assert fleet.load("a", 0.0).joining == 0.0
    for beside in [0, 3, 7, 1, 5] * 10:
        others = [fleet.begin(one, 0.0, 0.0) for _ in range(beside)]
        for other in others:
            fleet.token(other, 0.0)
        leg = fleet.begin(one, 0.0, 0.0)
        fleet.token(leg, 1.0)
        leg.tokens = 101
        fleet.end(leg, 1.0 + 100 * (0.010 + 0.002 * beside))
        for other in others:
            fleet.end(other, 1.0)
    running = [fleet.begin(one, 0.0, 2.0) for _ in range(4)]
    for leg in running:
        fleet.token(leg, 2.0)
    # Four get each of some hundred tokens 2 ms later, and the new one gets its own as much later.
    assert fleet.load("a", 2.0).joining == pytest.approx(2 * 4 * 0.002 * 110, rel=0.15)


def test_what_was_begun_and_ended_is_counted_and_who_waits_says_what_it_takes() -> None:
    fleet, prefill, decode = Fleet(prefill_tokens_min=300), worker("p", "prefill"), worker("d")
    assert fleet.blocks_wanted() == 0
    fleet.begin(prefill, 2.0, 0.0, 1000)
    small, large = fleet.begin(decode, 0.5, 0.0, 100, 100), fleet.begin(decode, 0.5, 0.0, 321, 321)
    assert fleet.prefill_seconds == 2.5, "a long prompt is a prefill worker's, also where a decode worker computes it"
    assert fleet.blocks_wanted() == 21, "of those at decode workers"
    fleet.token(large, 1.0)
    assert fleet.blocks_wanted() == 7
    fleet.end(small, 2.0)
    fleet.end(large, 2.0)
    assert fleet.ended == {"decode": 2}


def test_what_a_stream_alone_waits_is_learnt_from_streams_in_company() -> None:
    fleet, one = Fleet(), worker("d")
    assert fleet.alone_seconds == 0.0
    for beside in (0, 3, 7):
        others = [fleet.begin(one, 0.0, 0.0) for _ in range(beside)]
        for leg in others:
            fleet.token(leg, 0.0)
        leg = fleet.begin(one, 0.0, 0.0)
        fleet.token(leg, 0.0)
        leg.tokens = 101
        fleet.end(leg, 100 * (0.02 + 0.001 * beside))
        for other in others:
            fleet.end(other, 0.0)
    assert fleet.alone_seconds == pytest.approx(0.02, rel=0.01)
