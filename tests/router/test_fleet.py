import msgspec

from cachebus.messages import Worker
from router.fleet import Fleet, candidates


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
