"""Which way a prompt goes and who waits for whom, over real HTTP and a real bus; only the engines are doubles."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from engine_double import EngineDouble
from router_under_test import MakeEngine, RouterUnderTest
from tests_shared import ANSWER_MS, NAMESPACE, Bus, wait_for

from cachebus.keys import chunk_keys, root_key
from cachebus.messages import Worker
from cachebus.messages_routers import Claim
from router.costs import Way
from router.health import FAILURES_MAX
from router.policies import Ask, ByRule

LONG = "x" * 1100


def ask(router: RouterUnderTest, prompt: Any, **more: Any) -> dict[str, str]:
    status, headers, _ = router.post({"model": "m", "prompt": prompt, **more})
    assert status == 200
    return headers


@pytest.fixture
def forgetful(make_engine: MakeEngine) -> Iterator[MakeEngine]:
    """Prefill workers that compute and keep nothing, as with a region that is too small."""

    def make(name: str) -> EngineDouble:
        engine: EngineDouble = make_engine(name, "prefill")
        engine._store = lambda ids, adapter: None  # type: ignore[method-assign]
        return engine

    return make


def test_idle_prefill_workers_take_turns(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    first, second = make_engine("a", "prefill"), make_engine("b", "prefill")
    make_engine("d", "decode")
    router.knows(3)
    for letter in "pqrs":
        ask(router, letter * 1100)
    assert (len(first.bodies), len(second.bodies)) == (2, 2)


def test_a_waiter_leads_when_the_leaders_worker_dies_in_the_middle(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    bad, good = make_engine("a", "prefill"), make_engine("b", "prefill")
    make_engine("d", "decode")
    router.knows(3)
    bad.hold.clear()
    bad.status = 500
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, router, LONG + str(number)) for number in range(3)]
        wait_for(lambda: len(bad.bodies) == 1 and b"in_flight 3.0" in router.get("/metrics")[1])
        bad.hold.set()
        routes = sorted(answer.result()["x-headstart-route"] for answer in answers)
    assert routes == ["decode", "decode", "prefill+decode"]
    assert (len(bad.bodies), len(good.bodies)) == (1, 1)


def test_a_second_prefill_worker_is_asked_within_the_retry_budget_alone(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    bad, good = make_engine("a", "prefill"), make_engine("b", "prefill")
    make_engine("d", "decode")
    router.knows(3)
    bad.status = good.status = 500
    assert ask(router, LONG)["x-headstart-route"] == "decode"
    assert len(bad.bodies) + len(good.bodies) == 2
    router.gateway.retries._saved = 0.0
    router.gateway.retries._at = time.monotonic()
    assert ask(router, LONG + "more")["x-headstart-route"] == "decode"
    assert len(bad.bodies) + len(good.bodies) == 3


def test_a_request_that_every_worker_fails_at_takes_none_of_them_out(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    engines = [make_engine(name, "decode") for name in "abc"]
    router.knows(3)
    for engine in engines:
        engine.status = 500
    for _ in range(2 * FAILURES_MAX):
        assert router.post({"model": "m", "prompt": [7]})[0] == 502
    assert not out(router)
    # One that fails where others do not is another matter.
    for engine in engines[1:]:
        engine.status = 200
    for _ in range(4 * FAILURES_MAX):
        ask(router, [7])
    assert out(router) == {"a"}


def out(router: RouterUnderTest) -> set[str]:
    """The workers whose breakers are open."""
    gateway = router.gateway
    found: set[str] = gateway.fleet.health.out(gateway.watch.replica.workers.values(), time.monotonic())
    return found


def test_when_prefill_fails_the_leaders_decode_worker_computes_for_all(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    prefill.hold.clear()
    prefill.status = 500
    decode.hold.clear()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, router, LONG) for _ in range(4)]
        wait_for(lambda: len(prefill.bodies) == 1 and b"in_flight 4.0" in router.get("/metrics")[1])
        prefill.hold.set()
        wait_for(lambda: b'headstart_prefills_total{outcome="failed"} 1.0' in router.get("/metrics")[1] and len(decode.bodies) == 1)
        for _ in range(20):
            router.get("/health")
        assert (len(prefill.bodies), len(decode.bodies)) == (1, 1), "the others must follow the leader"
        decode.hold.set()
        assert all(answer.result()["x-headstart-route"] == "decode" for answer in answers)


def test_where_nothing_is_kept_waiters_do_not_queue_up_for_prefills(forgetful: MakeEngine, make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = forgetful("p"), make_engine("d", "decode")
    router.knows(2)
    prefill.hold.clear()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, router, LONG) for _ in range(4)]
        wait_for(lambda: len(prefill.bodies) == 1 and b"in_flight 4.0" in router.get("/metrics")[1])
        prefill.hold.set()
        routes = sorted(answer.result()["x-headstart-route"] for answer in answers)
    assert routes == ["decode"] * 3 + ["prefill+decode"]
    assert (len(prefill.bodies), len(decode.bodies)) == (1, 4)


def test_a_prompt_longer_than_the_model_is_left_to_decode_to_refuse(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    decode.status = 400
    status, headers, raw = router.post({"model": "m", "prompt": [7] * 8192})
    assert (status, raw.count(b'"message":"no"')) == (400, 1)
    assert "x-request-id" in headers
    assert (prefill.bodies, len(decode.bodies)) == ([], 1)


def test_beam_search_and_a_chats_stray_prompt_are_not_split(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    assert ask(router, LONG, use_beam_search=True)["x-headstart-route"] == "decode"
    assert "prompt_token_ids" not in decode.bodies[-1]["kv_transfer_params"]
    # The double renders a stray prompt instead of the messages, as no engine would: what matters is that it was asked.
    router.post({"model": "m", "messages": [{"role": "user", "content": "hi"}], "prompt": [5] * 2000}, "/v1/chat/completions")
    assert prefill.bodies == []


def test_a_request_without_a_model_stays_with_the_model_it_was_rendered_by(bus: Bus, make_engine: MakeEngine, router: RouterUnderTest) -> None:
    one, other = make_engine("a", "decode"), make_engine("b", "decode", model="n")
    router.knows(2)
    one.status = 500
    assert router.post({"prompt": [1, 2, 3]})[0] == 502
    assert (len(one.bodies), len(other.bodies)) == (1, 0)


def test_a_full_router_says_so(bus: Bus, make_engine: MakeEngine) -> None:
    router = RouterUnderTest(bus, requests_max=1, queue_max=0)
    try:
        decode = make_engine("d", "decode")
        router.knows(1)
        decode.hold.clear()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(ask, router, "y")
            wait_for(lambda: len(decode.bodies) == 1)
            status, headers, raw = router.post({"model": "m", "prompt": "z"})
            assert (status, headers["retry-after"], b"router.requests_max" in raw) == (503, "1", True)
            decode.hold.set()
            running.result()
        wait_for(lambda: router.gateway.requests == 0)
        ask(router, "z")
    finally:
        router.stop()


@pytest.mark.parametrize("held", ["prefill", "decode"])
def test_what_one_router_has_computed_another_does_not_compute(bus: Bus, make_engine: MakeEngine, router: RouterUnderTest, held: str) -> None:
    """Through prefill, and, where there is none, on the first one's decode worker."""
    busy = make_engine("p" if held == "prefill" else "d", held)
    if held == "prefill":
        make_engine("d", "decode")
    second = RouterUnderTest(bus)
    keys = chunk_keys(root_key(NAMESPACE), [ord(c) for c in LONG], 256)
    try:
        for one in (router, second):
            one.knows(2 if held == "prefill" else 1)
        busy.hold.clear()
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(ask, router, LONG)]
            wait_for(lambda: len(busy.bodies) == 1)
            answers.append(pool.submit(ask, second, LONG))
            wait_for(lambda: second.gateway.dispatcher.flights.covering(keys, 0) is not None)
            # The second knows of a way to compute it and does not take it.
            for _ in range(20):
                assert len(busy.bodies) == 1
                assert not answers[1].done()
                threading.Event().wait(0.02)
            if held == "decode":
                bus.store(*keys)
            busy.hold.set()
            routes = [answer.result()["x-headstart-route"] for answer in answers]
        assert routes == (["prefill+decode", "decode"] if held == "prefill" else ["decode", "decode"])
        assert len(busy.bodies) == (1 if held == "prefill" else 2)
        wait_for(lambda: bus.daemon.statistics()["claims"] == 0)
    finally:
        second.stop()


def test_a_router_that_dies_leaves_its_claim_to_the_next(bus: Bus, make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, _ = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    keys = chunk_keys(root_key(NAMESPACE), [ord(c) for c in LONG], 256)
    client = bus.client()
    client.call(Claim("dead", 1, keys, 0.5), ANSWER_MS)
    started = time.monotonic()
    assert ask(router, LONG)["x-headstart-route"] == "prefill+decode"
    assert 1 < time.monotonic() - started < 8, "it waited for as long as a silent router is believed"
    assert len(prefill.bodies) == 1
    client.close()


class Following(ByRule):
    """By rule, but it tells when to follow."""

    tells_when = True
    begins: Callable[[], float | None]

    def follows_in(self, ask: Ask, way: Way, prefill: Worker, chunks: int) -> float | None:
        return self.begins()


def follow(router: RouterUnderTest, begins: Callable[[], float | None]) -> None:
    """From now on decode legs follow prefill legs when ``begins`` says, in seconds after a chunk was stored."""
    policy = Following(router.settings, router.gateway.watch.replica, router.gateway.fleet)
    policy.begins = begins
    router.gateway.dispatcher.policy = policy


def looking(router: RouterUnderTest) -> int:
    """How many tasks look when a decode leg may follow the prefill leg under way."""
    (flight,) = router.gateway.dispatcher.flights.under_way
    coroutines = [task.get_coro() for task in asyncio.all_tasks(flight.task.get_loop())]
    return sum(getattr(coroutine, "__name__", "") == "nearly_computed" for coroutine in coroutines)


def test_nobody_looks_when_to_follow_for_a_policy_that_never_tells(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, _ = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    tasks = []
    with ThreadPoolExecutor(1) as pool:
        for prompt, tells in ((LONG, False), ("y" * len(LONG), True)):
            if tells:
                follow(router, lambda: None)
            prefill.hold.clear()
            asked, answer = len(prefill.bodies), pool.submit(ask, router, prompt)
            wait_for(lambda before=asked: len(prefill.bodies) > before)
            tasks.append(looking(router))
            prefill.hold.set()
            assert answer.result()["x-headstart-route"] == "prefill+decode"
    assert tasks == [0, 1]


@pytest.mark.parametrize("fails", [False, True])
def test_a_fault_in_looking_when_to_follow_costs_no_answer(
    bus: Bus, make_engine: MakeEngine, router: RouterUnderTest, caplog: pytest.LogCaptureFixture, *, fails: bool
) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    told = threading.Event()

    def begins() -> float:
        told.set()
        if fails:
            raise RuntimeError("no such rate")
        return 0.0

    follow(router, begins)
    prefill.hold.clear()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, router, LONG)
        wait_for(lambda: len(prefill.bodies) == 1)
        bus.store(chunk_keys(root_key(NAMESPACE), [ord(c) for c in LONG], 256)[0])
        wait_for(told.is_set)
        if fails:
            wait_for(lambda: "waits for the prefill leg's end" in caplog.text)
            assert not decode.bodies
        else:
            wait_for(lambda: len(decode.bodies) == 1)
        prefill.hold.set()
        assert answer.result()["x-headstart-route"] == "prefill+decode"
    assert ("RuntimeError: no such rate" in caplog.text) == fails
    assert "never retrieved" not in caplog.text


def test_what_handing_over_takes_is_told_from_the_prompts_end(
    make_engine: MakeEngine, router: RouterUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one that was not before other prompts' turn; a request that went straight to decode hands nothing over."""
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    told: list[tuple[int, str, float]] = []
    policy = router.gateway.dispatcher.policy
    monkeypatch.setattr(policy, "hand_over_took", lambda ask, worker, seconds: told.append((ask.tokens, worker.worker, seconds)))
    ask(router, "short")
    assert told == []
    prefill.hold.clear()
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(ask, router, LONG)
        wait_for(lambda: len(prefill.bodies) == 1)
        threading.Event().wait(0.5)
        prefill.hold.set()
        answer.result()
        (found,) = told
        assert found[:2] == (len(LONG), "d")
        assert 0 < found[2] < 0.4, "what the prompt itself took is none of it"
        decode.hold.clear()
        answers = [pool.submit(ask, router, prompt) for prompt in ("short", "z" * len(LONG))]
        wait_for(lambda: len(decode.bodies) == 4)
        decode.hold.set()
        assert [one.result()["x-headstart-route"] for one in answers] == ["decode", "prefill+decode"]
    assert len(told) == 1, "the second one waited for the turn of the short one's prompt"
