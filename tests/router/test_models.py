"""Several models and LoRA adapters in one cluster: requests go by name to workers that serve it, and none has another's cache."""

from __future__ import annotations

import json

import pytest
from router_under_test import MakeEngine, RouterUnderTest
from tests_shared import Bus

from cachebus.errors import BusError

LONG = "x" * 1100
ADAPTERS = {"french": "d1", "poems": "d2"}


def test_requests_go_to_workers_of_their_model(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    workers = {name: make_engine(name, (name[0] == "p" and "prefill") or "decode", model=name[1:]) for name in ("pone", "done", "ptwo", "dtwo")}
    router.knows(4)
    for model in ("one", "two", "one"):
        status, headers, _ = router.post({"model": model, "prompt": model + LONG})
        assert (status, headers["x-headstart-worker"]) == (200, f"d{model}")
    assert {name: len(worker.bodies) for name, worker in workers.items()} == {"pone": 1, "done": 2, "ptwo": 1, "dtwo": 1}
    assert [model["id"] for model in json.loads(router.get("/v1/models")[1])["data"]] == ["one", "two"]
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/tokenize"):
        status, _, raw = router.post({"model": "three", "prompt": LONG, "messages": [], "input": LONG}, path)
        assert (status, json.loads(raw)["error"]["type"]) == (404, "not_found_error")


def test_an_adapter_is_a_model_with_a_cache_of_its_own(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill", adapters=ADAPTERS), make_engine("d", "decode", adapters=ADAPTERS)
    router.knows(2)
    listed = json.loads(router.get("/v1/models")[1])["data"]
    assert [(model["id"], model.get("parent")) for model in listed] == [("french", "m"), ("m", None), ("poems", "m")]
    for model in ("m", "french", "poems"):
        for route in ("prefill+decode", "decode"):
            status, headers, _ = router.post({"model": model, "prompt": LONG})
            assert (status, headers["x-headstart-route"]) == (200, route)
    assert [body["model"] for body in prefill.bodies] == ["m", "french", "poems"]
    assert [body["model"] for body in decode.bodies] == ["m", "m", "french", "french", "poems", "poems"]


def test_an_adapter_goes_only_where_it_is_served(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, _, able = make_engine("p", "prefill"), make_engine("a", "decode"), make_engine("b", "decode", adapters=ADAPTERS)
    router.knows(3)
    for _ in range(3):
        status, headers, _ = router.post({"model": "french", "prompt": LONG})
        assert (status, headers["x-headstart-worker"], headers["x-headstart-route"]) == (200, "b", "decode")
    assert prefill.bodies == []
    assert len(able.bodies) == 3


def test_one_name_is_not_two_adapters(bus: Bus) -> None:
    bus.register("a", "decode", "http://x", adapters=ADAPTERS)
    bus.register("b", "decode", "http://x", adapters=ADAPTERS)
    with pytest.raises(BusError, match="french is adapter d3 of m at c and adapter d1 of m at"):
        bus.register("c", "decode", "http://x", adapters={"french": "d3"})
    with pytest.raises(BusError, match="french is a model at c and adapter d1 of m at"):
        bus.register("c", "decode", "http://x", "french")
