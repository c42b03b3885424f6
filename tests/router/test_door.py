"""The queue, deadlines and the lack of prefill workers over real HTTP and a real bus; only the engines are doubles."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import pytest
from router_under_test import MakeEngine, RouterUnderTest
from tests_shared import Bus, wait_for

from cachebus.messages import Drain, Leave
from router.door import urgency_of
from router.errors import ApiError

LONG = "x" * 1100


@pytest.fixture
def narrow(bus: Bus) -> Iterator[RouterUnderTest]:
    """A router that lets one request run and two wait."""
    router = RouterUnderTest(bus, worker_requests_max=1, queue_max=2)
    yield router
    router.stop()


def post(router: RouterUnderTest, prompt: str, **headers: str) -> tuple[int, Any, dict[str, str], float]:
    """Status, answer, headers and seconds."""
    connection, started = HTTPConnection("127.0.0.1", router.port, timeout=20), time.monotonic()
    named = {"x-headstart-" + name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", "/v1/completions", json.dumps({"model": "m", "prompt": prompt}), {"content-type": "application/json"} | named)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer, {name.lower(): value for name, value in response.getheaders()}, time.monotonic() - started


def test_others_wait_by_priority_and_more_are_refused_at_once(make_engine: MakeEngine, narrow: RouterUnderTest) -> None:
    decode = make_engine("d", "decode")
    narrow.knows(1)
    decode.hold.clear()
    admission = narrow.gateway.door._admission
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, narrow, "first")
        wait_for(lambda: len(decode.bodies) == 1)
        low = pool.submit(post, narrow, "low", priority="-1")
        wait_for(lambda: admission.waiting == 1)
        middle = pool.submit(post, narrow, "middle")
        wait_for(lambda: admission.waiting == 2)
        status, answer, headers, seconds = post(narrow, "refused", priority="-1")
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "router_full", "1")
        assert seconds < 0.5
        high = pool.submit(post, narrow, "high", priority="7")
        assert low.result()[0] == 503, "its place is another's"
        decode.hold.set()
        assert [answer.result()[0] for answer in (first, middle, high)] == [200] * 3
    assert [body["prompt"] for body in decode.bodies] == ["first", "high", "middle"]
    assert (admission.running, admission.waiting) == (0, 0)


def test_a_deadline_ends_an_answer_that_is_not_ready_and_its_leg(make_engine: MakeEngine, narrow: RouterUnderTest) -> None:
    decode = make_engine("d", "decode")
    narrow.knows(1)
    decode.hold.clear()
    status, answer, _, seconds = post(narrow, "x", deadline_ms="300")
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    assert 0.3 <= seconds < 2
    wait_for(lambda: decode.aborted == 1)
    assert narrow.gateway.door.running == 0


def test_a_stream_ends_with_an_error_at_its_deadline(make_engine: MakeEngine, narrow: RouterUnderTest) -> None:
    decode = make_engine("d", "decode")
    decode.pieces = [b'data: {"choices":[{"text":"a"}]}\n\n'] * 1000
    narrow.knows(1)
    connection = HTTPConnection("127.0.0.1", narrow.port, timeout=20)
    connection.request("POST", "/v1/completions", json.dumps({"model": "m", "prompt": "x", "stream": True}), {"x-headstart-deadline-ms": "500"})
    *events, last, end = connection.getresponse().read().split(b"\n\n")
    connection.close()
    assert 5 < len(events) < 100
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "deadline_exceeded"
    assert end == b""


@pytest.mark.parametrize(
    ("name", "value"), [("priority", "high"), ("priority", "101"), ("deadline-ms", "0"), ("deadline-ms", "-5"), ("deadline-ms", "9" * 20)]
)
def test_headers_that_make_no_sense_are_refused(name: str, value: str) -> None:
    with pytest.raises(ApiError) as refused:
        urgency_of({f"x-headstart-{name}".encode(): value.encode()}, 10, 0)
    assert (refused.value.status, refused.value.param) == (400, f"x-headstart-{name}")


def test_a_deadline_is_no_later_than_the_routers_own() -> None:
    assert urgency_of({}, 10, 5).deadline == 15
    assert urgency_of({b"x-headstart-deadline-ms": b"2500", b"x-headstart-priority": b"-3"}, 10, 5) == type(urgency_of({}, 1, 1))(-3, 7.5)
    assert urgency_of({b"x-headstart-deadline-ms": b"60000"}, 10, 5).deadline == 15


def test_a_long_prompt_is_refused_when_all_prefill_workers_are_gone(bus: Bus, make_engine: MakeEngine) -> None:
    router = RouterUnderTest(bus, decode_tokens_max=600)
    client = bus.client()
    try:
        decode = make_engine("d", "decode")
        router.knows(1)
        assert post(router, LONG)[0] == 200, "a cluster that never had any computes on decode"
        make_engine("p", "prefill")
        router.knows(2)
        client.call(Leave("p"), 3000)
        router.knows(1)
        status, answer, headers, _ = post(router, "y" * 1100)
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "no_prefill_worker", "1")
        assert "router.decode_tokens_max: 600" in answer["error"]["message"]
        assert post(router, "z" * 560)[2]["x-headstart-route"] == "decode"
        assert len(decode.bodies) == 2
        assert router.gateway.dispatcher.flights._by_key == {}
    finally:
        router.stop()
        client.close()


def test_a_draining_prefill_worker_gets_nothing_new_and_what_it_computes_is_used(bus: Bus, make_engine: MakeEngine, router: RouterUnderTest) -> None:
    draining, other = make_engine("a", "prefill"), make_engine("b", "prefill")
    make_engine("d", "decode")
    router.knows(3)
    client = bus.client()
    draining.hold.clear()
    other.hold.clear()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(post, router, LONG), pool.submit(post, router, "y" * 1100)]
        wait_for(lambda: len(draining.bodies) == len(other.bodies) == 1)
        client.call(Drain("a"), 3000)
        wait_for(lambda: router.gateway.watch.replica.workers["a"].draining)
        other.hold.set()
        assert post(router, "z" * 1100)[2]["x-headstart-route"] == "prefill+decode"
        draining.hold.set()
        assert {answer.result()[2]["x-headstart-route"] for answer in answers} == {"prefill+decode"}
    assert (len(draining.bodies), len(other.bodies)) == (1, 2)
    client.close()
