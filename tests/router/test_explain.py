"""A client that asks is told what each way would have cost, over real HTTP; the engines are doubles."""

from __future__ import annotations

import json
from http.client import HTTPConnection

from router_under_test import MakeEngine, RouterUnderTest
from tests_shared import Bus

from router.costs import Way
from router.explain import explanation


def ask(router: RouterUnderTest, prompt: str, **headers: str) -> dict[str, str]:
    connection = HTTPConnection("127.0.0.1", router.port, timeout=20)
    connection.request("POST", "/v1/completions", json.dumps({"model": "m", "prompt": prompt}), {"content-type": "application/json", **headers})
    response = connection.getresponse()
    response.read()
    connection.close()
    assert response.status == 200
    return {name.lower(): value for name, value in response.getheaders()}


def test_the_ways_come_with_their_seconds_the_one_taken_first(bus: Bus, make_engine: MakeEngine) -> None:
    for name, role in (("p", "prefill"), ("d", "decode"), ("e", "decode")):
        make_engine(name, role)
    router = RouterUnderTest(bus, policy="cost")
    router.knows(3)
    try:
        headers = ask(router, "x" * 1100, **{"x-headstart-explain": "1"})
        ways = json.loads(headers["x-headstart-explanation"])
        assert {(way["prefill"], way["decode"]) for way in ways} == {("", "d"), ("", "e"), ("p", "d"), ("p", "e")}
        assert [way["total"] for way in ways] == sorted(way["total"] for way in ways)
        assert ways[0]["tokens"] == 1100
        assert ways[0]["compute"] > 0
        assert (headers["x-headstart-route"] == "decode") == (ways[0]["prefill"] == "")
        assert "x-headstart-explanation" not in ask(router, "x" * 1100)
    finally:
        router.stop()


def test_no_more_ways_are_told_than_anybody_reads() -> None:
    assert len(json.loads(explanation([Way(decode=str(number)) for number in range(100)]))) == 5
    assert explanation([]) == "[]"
