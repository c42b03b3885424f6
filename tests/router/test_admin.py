"""The admin routes: at their own port, and where that is open to others under an admin's key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from router_under_test import RouterUnderTest
from tenants_under_test import TenantsUnderTest
from tests_shared import Bus, wait_for

from cachebus.errors import HeadstartError
from cachebus.ports import free_port
from router.scaling_settings import ScalingSettings
from router.serve import serve
from router.settings import RouterSettings


@pytest.fixture
def tenants(tmp_path: Path) -> TenantsUnderTest:
    found = TenantsUnderTest(tmp_path / "tenants.yaml")
    found.add("a", "requests_per_minute: 7")
    found.add("root", "admin: true")
    return found


@pytest.fixture
def router(bus: Bus, tenants: TenantsUnderTest) -> Iterator[RouterUnderTest]:
    router = RouterUnderTest(bus, str(tenants.path), scaling=ScalingSettings(reading_seconds=1), admin_port=free_port("127.0.0.1"))
    yield router
    router.stop()


def ask(port: int, path: str, headers: dict[str, str] | None = None, method: str = "GET") -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers=headers or {})
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    return response.status, raw


def test_the_admin_port_has_the_admin_routes_and_the_other_port_has_not(router: RouterUnderTest, tenants: TenantsUnderTest) -> None:
    port = router.settings.admin_port
    assert b"headstart_requests_in_flight" in ask(port, "/metrics")[1]
    rows = json.loads(ask(port, "/tenants")[1])["tenants"]
    assert [(row["name"], row["keys"], row["requests_per_minute"], row["admin"]) for row in rows] == [("a", 1, 7, False), ("root", 1, 0, True)]
    for path in ("/v1/models", "/v1/completions", "/nothing"):
        status, raw = ask(port, path)
        assert (status, json.loads(raw)["error"]["code"]) == (404, "unknown_url")
    assert ask(port, "/metrics", method="POST")[0] == 405
    assert router.get("/tenants", tenants.bearer("root"))[0] == 404
    lie = {**tenants.bearer("a"), "host": f"127.0.0.1:{port}", "x-forwarded-port": str(port), "x-forwarded-host": f"localhost:{port}"}
    assert router.get("/tenants", lie)[0] == 404


def test_with_keys_metrics_at_the_open_port_are_an_admins(router: RouterUnderTest, tenants: TenantsUnderTest) -> None:
    assert router.get("/metrics")[0] == 401
    assert router.get("/metrics", tenants.bearer("a"))[0] == 403
    assert router.get("/metrics", tenants.bearer("root"))[0] == 200


def test_an_admin_port_that_others_reach_asks_for_an_admins_key(bus: Bus, tenants: TenantsUnderTest) -> None:
    router = RouterUnderTest(bus, str(tenants.path), admin_port=free_port("127.0.0.1"), admin_host="0.0.0.0")
    try:
        port = router.settings.admin_port
        assert ask(port, "/metrics")[0] == 401
        assert ask(port, "/tenants", tenants.bearer("a"))[0] == 403
        assert ask(port, "/tenants", tenants.bearer("root"))[0] == 200
    finally:
        router.stop()


def test_wanted_sizes_are_an_admins_where_there_are_keys(router: RouterUnderTest, tenants: TenantsUnderTest) -> None:
    wait_for(lambda: ask(router.settings.admin_port, "/scaling")[0] == 200)
    told = json.loads(ask(router.settings.admin_port, "/scaling")[1])
    assert (told["prefill"]["wanted"], told["decode"]["wanted"], told["decode"]["ready"]) == (1, 1, 0)
    assert all(told[pool]["reasons"] for pool in ("prefill", "decode"))
    assert router.get("/scaling")[0] == 401
    assert router.get("/scaling", tenants.bearer("a"))[0] == 403
    assert json.loads(router.get("/scaling", tenants.bearer("root"))[1])["prefill"]["wanted"] == 1


def test_who_does_not_read_workers_tells_no_sizes(bus: Bus) -> None:
    router = RouterUnderTest(bus, scaling=ScalingSettings(reading_seconds=0))
    try:
        status, raw = router.get("/scaling")
        assert (status, json.loads(raw)["error"]["code"]) == (503, "scaling_unknown")
    finally:
        router.stop()


def test_an_admin_port_for_others_without_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match=r"router\.admin_host: 0\.0\.0\.0 .* security\.tenants_file"):
        serve(RouterSettings(port=0, admin_port=free_port("127.0.0.1"), admin_host="0.0.0.0"), tmp_path)
    assert RouterSettings(port=8000, admin_port=8000).problems() == [("admin_port", "8000 is router.port, too: give another")]
