"""The console's figures over real HTTP and a real bus; only the engines are doubles. The page itself: test_console_page.py."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from router_under_test import MakeEngine, RouterUnderTest
from tenants_under_test import TenantsUnderTest
from tests_shared import Bus, wait_for

from cachebus.ports import free_port
from router.console import PAGE

LONG = "x" * 1100


def figures(router: RouterUnderTest, request: str = "") -> Any:
    status, raw = router.get("/console/data" + (f"?request={request}" if request else ""))
    assert status == 200
    return json.loads(raw)


def over(router: RouterUnderTest) -> Any:
    """The figures once nothing is under way: a client has its last byte before that."""
    wait_for(lambda: not router.gateway.recent.under_way)
    return figures(router)


def head(port: int, path: str, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers=headers or {})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}


def test_the_figures_are_those_of_what_was_asked(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    before = figures(router)
    assert (before["last"], before["hits"]["prompt_tokens"], before["ttft"]["median"]) == ([], 0, None)
    for _ in range(2):
        assert router.post({"model": "m", "prompt": LONG, "stream": True})[0] == 200
    found = over(router)
    assert found["ready"]
    assert found["bus"]
    assert [(w["worker"], w["role"], w["model"], w["state"], w["requests"]) for w in found["workers"]] == [
        ("d", "decode", "m", "ready", 0),
        ("p", "prefill", "m", "ready", 0),
    ]
    # The first prompt was computed for its request, the second came from DRAM but for its last token.
    assert found["hits"] == {"prompt_tokens": 2200, "cached": {"dram": 1099}}
    assert found["ttft"]["requests"] == 2
    assert 0 < found["ttft"]["median"] <= found["ttft"]["p99"] < 20
    assert [(row["route"], row["status"], row["cached"]) for row in found["last"]] == [
        ("decode", 200, {"dram": 1099}),
        ("prefill+decode", 200, {}),
    ]
    wait_for(lambda: [tier["chunks"] for tier in figures(router)["tiers"] or []] == [4])
    (dram,) = figures(router)["tiers"]
    assert dram["tier"] == "dram"
    assert 0 < dram["bytes"] < dram["capacity"]
    assert prefill.bodies
    assert decode.bodies


def test_a_requests_path_is_told_from_its_body_to_its_last_byte(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    _, headers, _ = router.post({"model": "m", "prompt": LONG, "stream": True})
    over(router)
    path = figures(router, headers["x-request-id"])["request"]
    phases = path["phases"]
    assert [(p["name"], p["worker"]) for p in phases] == [("receive", ""), ("render", "d"), ("prefill", "p"), ("decode", "d")]
    moments = [moment for p in phases for moment in (p["begun"], p["first_token"], p["ended"]) if moment is not None]
    assert moments == sorted(moments)
    assert moments[0] >= 0
    assert moments[-1] <= path["seconds"]
    # The double sends four events, each 10 ms after the one before.
    assert phases[-1]["ended"] - phases[-1]["first_token"] >= 0.02
    assert path["ttft"] == phases[-1]["first_token"]
    assert phases[-1]["cached"] == {"dram": 1099}
    assert len(path["ways"]) == 1
    assert figures(router, "f" * 32)["request"] is None


def test_what_is_under_way_is_shown_and_who_waits_for_whom(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, _ = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    prefill.hold.clear()
    connections = []
    for _ in range(2):
        connection = HTTPConnection("127.0.0.1", router.port, timeout=20)
        connection.request("POST", "/v1/completions", json.dumps({"model": "m", "prompt": LONG}), {"content-type": "application/json"})
        connections.append(connection)
        wait_for(lambda: router.gateway.dispatcher.flights.under_way and len(router.gateway.recent.under_way) == len(connections))
    wait_for(lambda: figures(router)["flights"]["some"][0]["waiting"] == 1)
    found = figures(router)
    assert found["flights"]["count"] == 1
    assert (found["flights"]["some"][0]["leg"], found["flights"]["some"][0]["chunks"]) == ("prefill", 4)
    assert {(row["under_way"], row["status"], row["ttft"]) for row in found["last"]} == {(True, 0, None)}
    assert next(w for w in found["workers"] if w["worker"] == "p")["requests"] == 1
    prefill.hold.set()
    for connection in connections:
        assert connection.getresponse().status == 200
        connection.close()
    found = over(router)
    assert (found["requests"]["under_way"], found["flights"]["count"]) == (0, 0)
    names = [[p["name"] for p in figures(router, row["id"])["request"]["phases"]] for row in found["last"]]
    assert sorted(names) == [["receive", "render", "prefill", "decode"], ["receive", "render", "wait", "decode"]]


def test_who_queues_before_the_router_is_seen(bus: Bus, make_engine: MakeEngine) -> None:
    decode = make_engine("d", "decode")
    router = RouterUnderTest(bus, worker_requests_max=1, queue_max=2)
    try:
        router.knows(1)
        decode.hold.clear()
        with ThreadPoolExecutor(2) as pool:
            for _ in range(2):
                pool.submit(router.post, {"model": "m", "prompt": "y"})
            wait_for(lambda: figures(router)["requests"]["waiting"] == 1)
            assert figures(router)["requests"]["under_way"] == 2
            decode.hold.set()
        found = over(router)
        assert found["requests"]["waiting"] == 0
        names = [[p["name"] for p in figures(router, row["id"])["request"]["phases"]] for row in found["last"]]
        assert sorted(names) == [["receive", "decode"], ["receive", "queue", "decode"]]
    finally:
        router.stop()


def test_failures_and_refusals_are_among_the_last_requests(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    make_engine("d", "decode").status = 500
    router.knows(1)
    assert router.post({"model": "m", "prompt": "y"})[0] == 502
    assert router.post(b"{")[0] == 400
    refused, failed = over(router)["last"]
    assert (refused["status"], failed["status"]) == (400, 502)
    leg = figures(router, failed["id"])["request"]["phases"][-1]
    assert (leg["name"], leg["worker"], leg["failed"]) == ("decode", "d", "LegRefused")


def test_no_prompt_key_or_address_is_told(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    engine = make_engine("d", "decode")
    router.knows(1)
    router.post({"model": "m", "prompt": "secret words", "user": "someone"}, headers={"authorization": "Bearer hidden"})
    request = figures(router)["last"][0]["id"]
    raw = router.get(f"/console/data?request={request}")[1]
    for word in (b"secret", b"someone", b"hidden", engine.url.encode(), b"127.0.0.1"):
        assert word not in raw


def test_the_page_loads_nothing_from_elsewhere(router: RouterUnderTest) -> None:
    for path in PAGE:
        status, headers = head(router.port, path)
        assert status == 200
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        text = router.get(path)[1].decode().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text
    assert router.get("/console/other.js")[0] == 404


def test_with_keys_it_is_for_admins_and_open_at_the_admin_port(bus: Bus, tmp_path: Path) -> None:
    tenants = TenantsUnderTest(tmp_path / "tenants.yaml")
    tenants.add("a", "requests_per_minute: 7")
    tenants.add("root", "admin: true")
    router = RouterUnderTest(bus, str(tenants.path), admin_port=free_port("127.0.0.1"))
    try:
        for path in (*PAGE, "/console/data"):
            assert [router.get(path)[0], router.get(path, tenants.bearer("a"))[0], router.get(path, tenants.bearer("root"))[0]] == [401, 403, 200]
            assert head(router.settings.admin_port, path)[0] == 200
    finally:
        router.stop()
    router = RouterUnderTest(bus, str(tenants.path), admin_port=free_port("127.0.0.1"), admin_host="0.0.0.0")
    try:
        port = router.settings.admin_port
        # The files tell nothing, and a browser that has them asks for the key.
        assert {head(port, path)[0] for path in PAGE} == {200}
        assert [head(port, "/console/data")[0], head(port, "/console/data", tenants.bearer("a"))[0]] == [401, 403]
        assert head(port, "/console/data", tenants.bearer("root"))[0] == 200
        assert head(port, "/metrics")[0] == 401
    finally:
        router.stop()
