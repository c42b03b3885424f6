"""Who takes a leg, by rule and by cost; only the time and what is known are made up."""

from __future__ import annotations

import random

import pytest

from cachebus.codec import PROTOCOL_VERSION, EventBatch
from cachebus.messages import Report, SnapshotReply, Stored, Worker
from cachebus.messages_hbm import HbmChanged
from cachebus.replica import Replica
from router.costs import Learnt, Pool, delayed
from router.fleet import Fleet
from router.policies import BUSIER_MAX, Ask, ByCost, ByRule, warmest
from router.settings import RouterSettings

CHUNK = 256
MIB = 1 << 20


def worker(name: str, role: str = "decode", model: str = "m", *, draining: bool = False) -> Worker:
    return Worker(name, role, "http://x", model, b"n" * 32, 16, CHUNK, 1 << 20, True, draining, MIB)  # type: ignore[arg-type]


def keys(count: int) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in range(count)]


def ask(tokens: int, model: str = "m") -> Ask:
    return Ask(model, keys(tokens // CHUNK), tokens, CHUNK, MIB)


class World:
    """Workers, what they have, and how fast they are."""

    def __init__(self, *workers: Worker) -> None:
        self.replica, self.fleet, self.learnt = Replica(), Fleet(), Learnt()
        self.replica.load(SnapshotReply(1, 0, {}, list(workers), {}))
        self._seq = 0

    def tell(self, *events: object) -> None:
        self._seq += 1
        assert self.replica.apply(EventBatch(PROTOCOL_VERSION, 1, self._seq, list(events)))  # type: ignore[arg-type]

    def stored(self, chunks: int, tier: str = "dram") -> None:
        self.tell(Stored(keys(chunks), tier))  # type: ignore[arg-type]

    def in_hbm(self, name: str, chunks: int) -> None:
        self.tell(HbmChanged(name, keys(chunks), [], whole=True))

    def computes(self, name: str, tokens_per_second: float, **byte_seconds: float) -> None:
        self.learnt.take(Report("t", "prefill", name, 1, 0, {}, 1 / tokens_per_second, 0.0, dict(byte_seconds), 4096), "m")  # type: ignore[arg-type]

    def generate(self, name: str, requests: int) -> None:
        for _ in range(requests):
            self.fleet.token(self.fleet.begin(self.replica.workers[name], 0.0, 0.0), 0.0)

    def by_rule(self, policy: str) -> ByRule:
        return ByRule(RouterSettings(policy=policy), self.replica, self.fleet)  # type: ignore[arg-type]

    @property
    def by_cost(self) -> ByCost:
        return ByCost(RouterSettings(worker_requests_max=8), self.replica, self.fleet, self.learnt)


def taken(policy: ByRule | ByCost, times: int, of: Ask, role: str = "decode", without: tuple[str, ...] = ()) -> list[str]:
    return [chosen.worker.worker for _ in range(times) if (chosen := policy.worker(role, of, without, 0.0))]  # type: ignore[arg-type]


def test_the_least_busy_worker_takes_it_and_equals_take_turns() -> None:
    world = World(worker("a"), worker("b"), worker("c"), worker("p", "prefill"))
    policy = world.by_rule("least_loaded")
    assert taken(policy, 6, ask(1)) == ["a", "b", "c", "a", "b", "c"]
    world.generate("a", 2), world.generate("b", 1), world.generate("c", 2)
    assert taken(policy, 2, ask(1)) == ["b", "b"]
    assert taken(policy, 1, ask(1), without=("b",)) == ["a"]
    assert taken(policy, 1, ask(1, "other")) == []


def test_round_robin_looks_at_nothing() -> None:
    world = World(worker("a"), worker("b"))
    policy = world.by_rule("round_robin")
    world.generate("a", 9)
    world.in_hbm("b", 9)
    assert taken(policy, 4, ask(5000)) == ["a", "b", "a", "b"]


def test_the_warmest_of_those_that_are_not_much_busier() -> None:
    workers = [worker("a"), worker("b"), worker("c")]
    hbm_chunks = {"a": 1, "b": 3, "c": 3}
    limit = BUSIER_MAX["decode"]

    def names(**in_flight: int) -> list[str]:
        return [w.worker for w in warmest("decode", workers, in_flight, hbm_chunks)]

    assert names() == ["b", "c"]
    assert names(b=limit) == ["b", "c"]
    assert names(b=limit + 1) == ["c"]
    assert names(b=limit + 1, c=limit + 1) == ["a"]
    assert names(a=1, b=limit + 1, c=limit + 2) == ["b"]
    assert warmest("decode", [], {}, hbm_chunks) == []
    assert [w.worker for w in warmest("decode", workers, {}, {"gone": 9})] == ["a", "b", "c"]


def test_a_prefill_worker_is_preferred_for_its_hbm_only_among_the_least_busy() -> None:
    workers = [worker("a", "prefill"), worker("b", "prefill")]
    assert [w.worker for w in warmest("prefill", workers, {}, {"b": 1})] == ["b"]
    assert [w.worker for w in warmest("prefill", workers, {"b": 1}, {"b": 9})] == ["a"]


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "prefix_affinity"])
def test_by_rule_what_lacks_much_goes_through_prefill(policy: str) -> None:
    world = World(worker("p", "prefill"), worker("d"))
    rule = world.by_rule(policy)

    def through_prefill(tokens: int) -> bool:
        return bool(rule.ways(ask(tokens), 0.0)[0].prefill)

    assert [through_prefill(tokens) for tokens in (1023, 1024, 4096)] == [False, True, True]
    world.stored(13)
    assert [through_prefill(tokens) for tokens in (4096, 4352, 4351)] == [False, True, False]
    world.in_hbm("d", 14)
    assert through_prefill(4352) == (policy != "prefix_affinity")
    assert World(worker("p", "prefill")).by_rule(policy).ways(ask(4096), 0.0) == []
    assert not World(worker("d")).by_rule(policy).ways(ask(4096), 0.0)[0].prefill


def way(world: World, tokens: int, now: float = 0.0) -> tuple[str, str]:
    found = world.by_cost.ways(ask(tokens), now)[0]
    return found.prefill, found.decode


def test_an_idle_decode_worker_computes_what_a_busy_one_leaves_to_prefill() -> None:
    world = World(worker("p", "prefill"), worker("d"))
    world.computes("p", 10_000, dram=1e-11)
    assert way(world, 10_000) == ("", "d")
    world.generate("d", 1)
    assert way(world, 10_000) == ("p", "d")
    # A leg takes 5 ms whatever it computes: 20 tokens are not worth it.
    assert way(world, 20) == ("", "d")


def test_what_is_stored_is_not_computed() -> None:
    world = World(worker("p", "prefill"), worker("d"))
    world.computes("p", 10_000, dram=1e-11)
    world.generate("d", 8)
    assert way(world, 10_240) == ("p", "d")
    world.stored(40)
    found = world.by_cost.ways(ask(10_240), 0.0)[0]
    assert (found.prefill, found.decode) == ("", "d")
    assert found.pull == pytest.approx(40 * MIB * 1e-11)
    assert found.compute == pytest.approx(1e-4)


def test_a_tier_that_is_slower_than_computing_is_no_hit() -> None:
    world = World(worker("p", "prefill"), worker("d"))
    world.computes("p", 10_000, dram=1e-11, redis=1e-7)
    world.generate("d", 8)
    world.stored(40, "redis")
    found = world.by_cost.ways(ask(10_240), 0.0)[0]
    assert (found.prefill, found.pull) == ("p", pytest.approx(40 * MIB * 1e-11)), "only what decode pulls from DRAM afterwards"
    world.computes("p", 10_000, dram=1e-11, redis=1e-9)
    assert not world.by_cost.ways(ask(10_240), 0.0)[0].prefill


def test_hbm_spares_the_pull_until_the_queue_before_it_costs_more() -> None:
    world = World(worker("a"), worker("b"))
    world.computes("a", 10_000, dram=1e-9)
    world.stored(40)
    world.in_hbm("b", 40)
    assert taken(world.by_cost, 3, ask(10_240)) == ["b", "b", "b"]
    world.fleet.begin(world.replica.workers["b"], 0.02, 0.0)
    assert taken(world.by_cost, 1, ask(10_240)) == ["b"]
    world.fleet.begin(world.replica.workers["b"], 0.04, 0.0)
    assert taken(world.by_cost, 1, ask(10_240)) == ["a"], "40 MiB at 1 GB/s are 42 ms, less than 60 ms of queue"


def test_prefill_workers_are_taken_by_what_they_have_before_them() -> None:
    world = World(worker("p", "prefill"), worker("q", "prefill"), worker("d"))
    world.computes("p", 10_000)
    world.computes("q", 10_000)
    assert taken(world.by_cost, 4, ask(2000), "prefill") == ["p", "q", "p", "q"]
    world.fleet.begin(world.replica.workers["p"], 1.0, 0.0)
    world.fleet.begin(world.replica.workers["q"], 0.1, 0.0)
    world.fleet.begin(world.replica.workers["q"], 0.1, 0.0)
    assert taken(world.by_cost, 2, ask(2000), "prefill") == ["q", "q"], "two short prompts are less than a long one"


def test_a_faster_worker_takes_it_though_it_has_more_before_it() -> None:
    world = World(worker("p", "prefill"), worker("q", "prefill"))
    world.computes("p", 1000)
    world.computes("q", 10_000)
    world.fleet.begin(world.replica.workers["q"], 5.0, 0.0)
    assert taken(world.by_cost, 1, ask(8000), "prefill") == ["q"]
    assert taken(world.by_cost, 1, ask(4000), "prefill") == ["p"]


def test_nobody_waits_for_a_place_where_another_worker_has_one() -> None:
    """By the rates alone one that is ten times as fast takes all."""
    world = World(worker("d"), worker("e"))
    world.computes("d", 1000)
    world.computes("e", 10_000)
    world.generate("e", 7)
    assert taken(world.by_cost, 1, ask(1024)) == ["e"]
    assert [way.decode for way in world.by_cost.ways(ask(1024), 0.0)] == ["e", "d"]
    world.generate("e", 1)
    assert taken(world.by_cost, 1, ask(1024)) == ["d"]
    assert [way.decode for way in world.by_cost.ways(ask(1024), 0.0)] == ["d"]
    world.generate("d", 8)
    assert taken(world.by_cost, 1, ask(1024)) == ["e"], "where all are full the cheapest"


def test_who_comes_later_waits_for_a_flight_where_that_is_sooner() -> None:
    world = World(worker("p", "prefill"), worker("q", "prefill"), worker("d"))
    world.computes("p", 10_000, dram=1e-11)
    world.generate("d", 8)
    policy, of = world.by_cost, ask(10_240)
    first = policy.ways(of, 0.0)[0]
    assert policy.waits(of, first, until=0.5, chunks=40, now=0.0)
    assert policy.waits(of, first, until=first.own, chunks=40, now=0.0), "an idle worker is not there to compute what another has just begun"
    assert not policy.waits(of, first, until=3.0, chunks=40, now=0.0)
    assert not policy.waits(of, first, until=0.9, chunks=8, now=0.0), "a fifth of it is not worth waiting for nearly as long as all takes"
    assert policy.waits(of, first, until=-9.0, chunks=40, now=0.0), "one that is late ends soon"


def test_a_worker_that_has_learnt_nothing_is_taken_for_one_like_the_others() -> None:
    world = World(worker("a"), worker("b"), worker("c", model="other"))
    assert world.learnt.rates(worker("b")).token_seconds == 1e-4
    world.computes("a", 500, dram=1e-9)
    rates = world.learnt.rates(worker("b"))
    assert (rates.token_seconds, rates.byte_seconds) == (1 / 500, {"dram": 1e-9})
    world.computes("b", 1000, nvme=1e-8)
    rates = world.learnt.rates(worker("b"))
    assert (rates.token_seconds, rates.byte_seconds) == (1 / 1000, {"dram": 1e-9, "nvme": 1e-8})
    assert world.learnt.rates(worker("c", model="other")).token_seconds == 1e-4
    world.learnt.forget("a")
    assert world.learnt.rates(worker("b")).byte_seconds == {"nvme": 1e-8}


def test_who_has_seen_long_prompts_speaks_for_who_has_not() -> None:
    world = World(worker("a"), worker("b"))
    world.learnt.take(Report("t", "decode", "a", 1, 0, {}, 3e-5, 0.0, {}, 512), "m")
    assert world.learnt.rates(worker("a")).token_seconds == 3e-5
    world.learnt.take(Report("t", "decode", "b", 1, 0, {}, 2e-5, 1e-9, {}, 65536), "m")
    assert world.learnt.rates(worker("a")).attended_seconds == 1e-9
    world.learnt.take(Report("t", "decode", "a", 1, 0, {}, 3e-5, 2e-9, {}, 32768), "m")
    assert world.learnt.rates(worker("a")).attended_seconds == 2e-9


def test_a_crowded_pool_leaves_short_prompts_to_decode() -> None:
    world = World(worker("p", "prefill"), worker("d"))
    world.computes("p", 10_000, dram=1e-11)
    world.generate("d", 2)
    of = ask(5000)
    assert world.by_cost.ways(of, 0.0)[0].prefill == "p"
    prefill = world.replica.workers["p"]
    for tenth in range(300):
        world.fleet.end(world.fleet.begin(prefill, 0.08, tenth / 10), tenth / 10 + 0.08)
    assert world.by_cost.ways(of, 30.0)[0].prefill == "", "at 80% a second there costs four of those who come later"


def come(world: World, name: str, seconds: int, per_second: int) -> None:
    """Legs that compute nothing come to that worker for so long."""
    for number in range(seconds * per_second):
        at = number / per_second
        world.fleet.end(world.fleet.begin(world.replica.workers[name], 0.0, at), at)


def test_a_prompt_is_not_computed_where_all_have_to_pass() -> None:
    """An idle decode worker would have it computed as soon, but who comes meanwhile would wait for it: all of them, or an eighth."""
    one = World(worker("p", "prefill"), worker("d"))
    eight = World(worker("p", "prefill"), *(worker(f"d{number}") for number in range(8)))
    for world, name in ((one, "d"), (eight, "d0")):
        world.computes("p", 10_000, dram=1e-11)
        assert not world.by_cost.ways(ask(10_240), 0.0)[0].prefill, "nobody comes"
        come(world, name, 40, 1)
    assert one.by_cost.ways(ask(10_240), 40.0)[0].prefill == "p"
    assert not eight.by_cost.ways(ask(10_240), 40.0)[0].prefill
    assert not one.by_cost.ways(ask(10_240), 100.0)[0].prefill, "a minute later it is another matter"


def test_what_others_wait_is_that_of_a_queue_with_one_server() -> None:
    """The mean of what one more customer costs the others, by playing two queues that differ in that customer alone."""
    chance = random.Random(7)
    rate, service, extra, backlog = 4.0, 0.1, 0.5, 0.8
    cost = 0.0
    for _ in range(2000):
        at, free, later = 0.0, backlog, backlog + extra
        while later > max(free, at := at + chance.expovariate(rate)):
            cost += max(later, at) - max(free, at)
            took = chance.expovariate(1 / service)
            free, later = max(free, at) + took, max(later, at) + took
    found = delayed(extra, Pool(1, rate, backlog, rate * service))
    assert found == pytest.approx(cost / 2000, rel=0.06)
    assert delayed(extra, Pool(4, 4 * rate, backlog, rate * service)) < found, "several share it"
    assert delayed(extra, Pool(1, rate, backlog, 7.0)) < 10 * found, "a load that is more than all of the time is no endless wait"


def test_the_hand_over_is_learnt_and_counted() -> None:
    world = World(worker("p", "prefill"), worker("d"))
    world.computes("p", 10_000, dram=1e-10)
    world.generate("d", 1)
    policy, of = world.by_cost, ask(2048)
    before = policy.ways(of, 0.0)[0]
    assert before.prefill == "p"
    pull = 8 * MIB * 1e-10
    for _ in range(100):
        policy.hand_over_took(of, world.replica.workers["d"], 0.3 + pull + 1e-4)
    after = policy.ways(of, 0.0)
    assert after[0].prefill == "", "0.2 s on decode, and as long for who generates there, are less than 0.2 s on prefill and 0.3 of handing over"
    assert next(way for way in after if way.prefill).queue == pytest.approx(before.queue + 0.3 - 0.005, abs=1e-3)
