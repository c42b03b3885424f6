import msgspec

from cachebus.messages import Worker
from router.fleet import BUSIER_MAX, Fleet, candidates, warmest


def worker(name: str, role: str = "decode", model: str = "m", *, draining: bool = False) -> Worker:
    return Worker(name, role, "http://x", model, b"n" * 32, 16, 256, 8192, True, draining)  # type: ignore[arg-type]


def test_the_least_busy_worker_takes_it_and_equals_take_turns() -> None:
    fleet, workers = Fleet(), [worker("a"), worker("b"), worker("c")]
    assert [chosen.worker for _ in range(6) if (chosen := fleet.choose(workers, "decode", "m"))] == ["a", "b", "c", "a", "b", "c"]
    fleet.in_flight.update(a=2, b=1, c=2)
    assert [chosen.worker for _ in range(2) if (chosen := fleet.choose(workers, "decode", "m"))] == ["b", "b"]


def test_who_may_take_a_leg() -> None:
    able = worker("a")
    others = [worker("b", "prefill"), worker("c", model="other"), worker("d", draining=True), worker("e")]
    assert candidates([able, *others], "decode", "m", {"e"}) == [able]
    assert [w.worker for w in candidates([able, *others], "decode", None)] == ["a", "c", "e"]
    assert Fleet().choose(others, "decode", "m", {"e"}) is None
    assert msgspec.structs.replace(able, draining=True) not in candidates([msgspec.structs.replace(able, draining=True)], "decode", "m")


def test_the_warmest_of_those_that_are_not_much_busier() -> None:
    workers = [worker("a"), worker("b"), worker("c")]
    hbm_chunks = {"a": 1, "b": 3, "c": 3}
    limit = BUSIER_MAX["decode"]

    def names(**in_flight: int) -> list[str]:
        return [w.worker for w in warmest(workers, in_flight, hbm_chunks)]

    assert names() == ["b", "c"]
    assert names(b=limit) == ["b", "c"]
    assert names(b=limit + 1) == ["c"]
    assert names(b=limit + 1, c=limit + 1) == ["a"]
    assert names(a=1, b=limit + 1, c=limit + 2) == ["b"]
    assert warmest([], {}, hbm_chunks) == []
    assert [w.worker for w in warmest(workers, {}, {"gone": 9})] == ["a", "b", "c"]


def test_a_prefill_worker_is_preferred_for_its_hbm_only_among_the_least_busy() -> None:
    workers = [worker("a", "prefill"), worker("b", "prefill")]
    assert [w.worker for w in warmest(workers, {}, {"b": 1})] == ["b"]
    assert [w.worker for w in warmest(workers, {"b": 1}, {"b": 9})] == ["a"]


def test_among_equally_warm_ones_the_least_busy_takes_it_and_equals_take_turns() -> None:
    fleet, workers = Fleet(), [worker("a"), worker("b"), worker("c")]
    warm = {"b": 2, "c": 2}
    assert [chosen.worker for _ in range(4) if (chosen := fleet.choose(workers, "decode", "m", (), warm))] == ["b", "c", "b", "c"]
    fleet.in_flight["b"] = 1
    assert [chosen.worker for _ in range(2) if (chosen := fleet.choose(workers, "decode", "m", (), warm))] == ["c", "c"]
    assert fleet.choose(workers, "decode", "m", {"b", "c"}, warm) == workers[0]
