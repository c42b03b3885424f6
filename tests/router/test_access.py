"""Keys, what a tenant may ask in a minute, and what one tenant may see of another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI, RateLimitError
from router_under_test import MakeEngine, RouterUnderTest
from tenants_under_test import TenantsUnderTest
from tests_shared import Bus, wait_for

from cachebus import tenants as tenants_module

LONG, SHORT = "x" * 1100, "y" * 100


@pytest.fixture
def tenants(tmp_path: Path) -> TenantsUnderTest:
    found = TenantsUnderTest(tmp_path / "tenants.yaml")
    found.add("a")
    found.add("b")
    return found


@pytest.fixture
def guarded(bus: Bus, tenants: TenantsUnderTest) -> Iterator[RouterUnderTest]:
    router = RouterUnderTest(bus, str(tenants.path))
    yield router
    router.stop()


def test_every_route_but_two_needs_a_key(make_engine: MakeEngine, guarded: RouterUnderTest, tenants: TenantsUnderTest) -> None:
    decode = make_engine("d", "decode")
    guarded.knows(1)
    for path in ("/v1/models", "/v1/nothing", "/v1/completions", "/", "/health/"):
        status, raw = guarded.get(path)
        assert (status, json.loads(raw)["error"]["code"]) == (401, "missing_api_key")
    assert guarded.get("/health")[0] == guarded.get("/ready")[0] == 200
    for wrong in (
        {"authorization": "Bearer hs-wrong"},
        {"x-api-key": "hs-wrong"},
        {"authorization": f"Basic {tenants.keys['a']}", "x-api-key": "no"},
    ):
        status, headers, raw = guarded.post({"model": "m", "prompt": SHORT}, headers=wrong)
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
        assert json.loads(raw)["error"] == {
            "message": "Incorrect API key provided.",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
    assert decode.bodies == []
    for right in (tenants.bearer("a"), {"authorization": f"bearer  {tenants.keys['b']}"}, {"x-api-key": tenants.keys["b"]}):
        assert guarded.post({"model": "m", "prompt": SHORT}, headers=right)[0] == 200
        assert guarded.get("/v1/models", right)[0] == 200
    assert all(tenants.keys["a"] not in str(sent) + str(headers) for sent, headers in zip(decode.bodies, decode.headers, strict=True))


def test_a_key_that_is_taken_out_of_the_file_stops_to_open(
    make_engine: MakeEngine, guarded: RouterUnderTest, tenants: TenantsUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants_module, "LOOK_SECONDS", 0.0)
    make_engine("d", "decode")
    guarded.knows(1)
    assert guarded.get("/v1/models", tenants.bearer("a"))[0] == 200
    whole = tenants.path.read_text()
    tenants.path.write_text("b: [")
    assert guarded.get("/v1/models", tenants.bearer("a"))[0] == 200
    tenants.path.write_text(whole[whole.index("b:") :])
    assert guarded.get("/v1/models", tenants.bearer("a"))[0] == 401
    assert guarded.get("/v1/models", tenants.bearer("b"))[0] == 200


def test_both_legs_are_under_the_tenants_salt(make_engine: MakeEngine, guarded: RouterUnderTest, tenants: TenantsUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    guarded.knows(2)
    for name in ("a", "b"):
        assert guarded.post({"model": "m", "prompt": LONG}, headers=tenants.bearer(name))[1]["x-headstart-route"] == "prefill+decode"
    salts = guarded.gateway.tenants.now.salts
    assert [body["cache_salt"] for body in prefill.bodies] == [body["cache_salt"] for body in decode.bodies] == [salts["a"], salts["b"]]
    # An engine keeps what it tokenised, too, apart for each salt.
    assert [body["cache_salt"] for body in decode.rendered] == [salts["a"], salts["b"]]


def test_what_must_not_be_stored_is_not_prefilled_elsewhere(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    headers = {"cache-control": "max-age=0, No-Store"}
    assert router.post({"model": "m", "prompt": LONG}, headers=headers)[1]["x-headstart-route"] == "decode"
    assert decode.bodies[0]["kv_transfer_params"]["headstart"]["store"] is False
    assert router.post({"model": "m", "prompt": LONG}, headers={"x-headstart-cache-ttl": "30"})[0] == 200
    assert prefill.bodies[0]["kv_transfer_params"]["headstart"]["ttl_seconds"] == 30
    for bad in ("0", "-1", "1.5", "soon", "9" * 30):
        status, _, raw = router.post({"model": "m", "prompt": SHORT}, headers={"x-headstart-cache-ttl": bad})
        assert (status, json.loads(raw)["error"]["param"]) == (400, "x-headstart-cache-ttl")


def test_requests_a_minute(bus: Bus, make_engine: MakeEngine, tenants: TenantsUnderTest) -> None:
    tenants.add("c", "requests_per_minute: 2")
    make_engine("d", "decode")
    router = RouterUnderTest(bus, str(tenants.path))
    try:
        router.knows(1)
        for _ in range(2):
            assert router.post({"model": "m", "prompt": SHORT}, headers=tenants.bearer("c"))[0] == 200
        client = OpenAI(base_url=f"http://127.0.0.1:{router.port}/v1", api_key=tenants.keys["c"], max_retries=0)
        with pytest.raises(RateLimitError) as refused:
            client.completions.create(model="m", prompt=SHORT)
        assert refused.value.code == "rate_limit_exceeded"
        assert 0 < int(refused.value.response.headers["retry-after"]) <= 30
        assert router.get("/v1/models", tenants.bearer("c"))[0] == 200, "looking costs nothing"
        assert router.post({"model": "m", "prompt": SHORT}, headers=tenants.bearer("a"))[0] == 200
    finally:
        router.stop()


def test_a_tenant_goes_before_others_only_as_far_as_it_may(bus: Bus, make_engine: MakeEngine, tenants: TenantsUnderTest) -> None:
    tenants.add("c", "priority_max: 5")
    make_engine("d", "decode")
    router = RouterUnderTest(bus, str(tenants.path))
    try:
        router.knows(1)
        for name, priority, status in (("a", "1", 403), ("a", "-9", 200), ("a", "0", 200), ("c", "5", 200), ("c", "6", 403), ("c", "high", 400)):
            headers = {**tenants.bearer(name), "x-headstart-priority": priority}
            found, _, raw = router.post({"model": "m", "prompt": SHORT}, headers=headers)
            assert found == status, (name, priority, raw)
    finally:
        router.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_a_minute_are_those_of_prompts_and_answers(bus: Bus, make_engine: MakeEngine, tenants: TenantsUnderTest, stream: bool) -> None:
    tenants.add("c", "tokens_per_minute: 150")
    make_engine("d", "decode")
    router = RouterUnderTest(bus, str(tenants.path))
    try:
        router.knows(1)
        body = {"model": "m", "prompt": SHORT, "stream": stream}
        level = router.app_level
        assert router.post(body, headers=tenants.bearer("c"))[0] == 200
        wait_for(lambda: 48 < level("c") < 50)
        assert router.post(body, headers=tenants.bearer("c"))[0] == 200, "what is left lets one more in"
        wait_for(lambda: level("c") < -50)
        status, headers, raw = router.post(body, headers=tenants.bearer("c"))
        assert (status, json.loads(raw)["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 15 < int(headers["retry-after"]) <= 22
    finally:
        router.stop()
