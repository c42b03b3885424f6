"""Tenants on a simulated cluster: what one computed no other is given, in no tier; a group shares; router and connector agree on keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from router_under_test import RouterUnderTest
from sim_cluster import PROFILE, SimCluster, right
from tenants_under_test import TenantsUnderTest
from tests_shared import ANSWER_MS, Bus, wait_for

from cachebus.keys import chunk_keys, root_key
from cachebus.messages import Snapshot, SnapshotReply
from cachebus.ports import free_port
from deploy.cli import main

PROMPT = [number * 7 % 5000 for number in range(1600)]


@pytest.fixture
def tenants(tmp_path: Path) -> TenantsUnderTest:
    found = TenantsUnderTest(tmp_path / "tenants.yaml")
    for name, *settings in (("a",), ("b",), ("c", "group: g"), ("d", "group: g")):
        found.add(name, *settings)
    return found


@pytest.fixture
def router(bus: Bus, sims: SimCluster, tenants: TenantsUnderTest) -> Iterator[RouterUnderTest]:
    sims.launch("p", "prefill")
    sims.launch("d", "decode", 2)
    sims.ready(3)
    router = RouterUnderTest(bus, str(tenants.path), admin_port=free_port("127.0.0.1"))
    router.knows(3)
    yield router
    router.stop()


def ask(router: RouterUnderTest, headers: dict[str, str], prompt: list[int] = PROMPT) -> dict[str, str]:
    """An answer's headers; its tokens are the right ones."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 5, "return_token_ids": True}
    status, found, raw = router.post(body, headers=headers)
    assert status == 200, raw
    assert str(right(prompt, 5)).replace(" ", "").encode() in raw
    return found


def stored(bus: Bus) -> set[bytes]:
    client = bus.client()
    reply = client.call(Snapshot(), ANSWER_MS)
    client.close()
    assert isinstance(reply, SnapshotReply)
    return set(reply.keys["dram"])


def keys_of(router: RouterUnderTest, tenant: str) -> set[bytes]:
    """The keys that the router gives the tenant's prompt."""
    worker = next(iter(router.gateway.watch.replica.workers.values()))
    return set(chunk_keys(root_key(worker.namespace, router.gateway.tenants.now.salts[tenant]), PROMPT, worker.chunk_size))


def test_one_tenant_sees_nothing_of_another_and_a_group_shares(bus: Bus, router: RouterUnderTest, tenants: TenantsUnderTest) -> None:
    seen: set[bytes] = set()
    for name in ("a", "b", "c"):
        cold = ask(router, tenants.bearer(name))
        assert (cold["x-headstart-cached-tokens"], cold["x-headstart-cache-source"]) == ("0", "none"), name
        assert cold["x-headstart-route"] == "prefill+decode"
        seen |= keys_of(router, name)
        wait_for(lambda known=set(seen): stored(bus) == known)  # type: ignore[misc]
        warm = ask(router, tenants.bearer(name))
        assert int(warm["x-headstart-cached-tokens"]) > 1500
        assert warm["x-headstart-route"] == "decode", "the router finds the chunks under the keys that the connector gave them"
    shared = ask(router, tenants.bearer("d"))
    assert shared["x-headstart-route"] == "decode"
    assert int(shared["x-headstart-cached-tokens"]) > 1500
    assert len(seen) == 3 * (len(PROMPT) // 256)


def test_what_must_not_be_stored_is_in_no_tier(bus: Bus, router: RouterUnderTest, tenants: TenantsUnderTest) -> None:
    private = ask(router, {**tenants.bearer("a"), "cache-control": "no-store"})
    assert private["x-headstart-route"] == "decode"
    other = [1, *PROMPT]
    ask(router, tenants.bearer("a"), other)
    # What came later is there, so what came before would be, too.
    wait_for(lambda: len(stored(bus)) == len(other) // 256)
    assert not stored(bus) & keys_of(router, "a")


def test_a_chunk_may_be_stored_for_a_time(bus: Bus, router: RouterUnderTest, tenants: TenantsUnderTest) -> None:
    ask(router, {**tenants.bearer("a"), "x-headstart-cache-ttl": "3"})
    assert stored(bus) >= keys_of(router, "a")
    ask(router, tenants.bearer("b"))
    wait_for(lambda: not stored(bus) & keys_of(router, "a"), 10)
    assert stored(bus) >= keys_of(router, "b")


def test_a_tenants_cache_can_be_deleted(bus: Bus, router: RouterUnderTest, tenants: TenantsUnderTest, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        ask(router, tenants.bearer(name))
    options = ["--set", f"cache.run_dir={bus.run_dir}", "--set", f"security.tenants_file={tenants.path}", "--json"]
    wait_for(lambda: len(stored(bus)) == 18)
    assert main(["cache", "clear", "--tenant", "a", *options]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["dropped"] >= 6
    assert "shares" not in said.err
    assert stored(bus) == keys_of(router, "b") | keys_of(router, "c")
    connection = HTTPConnection("127.0.0.1", router.settings.admin_port, timeout=20)
    connection.request("DELETE", "/tenants/d/cache")
    answer = json.load(connection.getresponse())
    assert answer["shared_with"] == ["c"]
    assert answer["dropped"] >= 6
    assert stored(bus) == keys_of(router, "b")
    connection.request("DELETE", "/tenants/nobody/cache")
    assert connection.getresponse().status == 404
    connection.close()
    assert main(["cache", "clear", "--tenant", "gone", *options]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == 0
    assert main(["cache", "clear", *options]) == 2


def test_what_a_router_remembers_of_a_tenants_texts_goes_with_its_cache(bus: Bus, router: RouterUnderTest, tenants: TenantsUnderTest) -> None:
    """By the command, of which the bus tells every router, and by the admin route."""
    remembered = router.gateway.remembered
    # A byte of it is a token: long enough to be rendered.
    text = "?" * len(PROMPT)

    def known(tenant: str) -> bool:
        space = f"{PROFILE.model}\0{router.gateway.tenants.now.salts[tenant]}\0/v1/completions"
        return remembered.find(space.encode(), text.encode(), 256) is not None

    for name in ("a", "b", "c"):
        status, _, raw = router.post({"prompt": text, "max_tokens": 1}, headers=tenants.bearer(name))
        assert status == 200, raw
    assert [known(name) for name in "abcd"] == [True] * 4
    options = ["--set", f"cache.run_dir={bus.run_dir}", "--set", f"security.tenants_file={tenants.path}"]
    assert main(["cache", "clear", "--tenant", "a", *options]) == 0
    wait_for(lambda: not known("a"))
    assert [known(name) for name in "bcd"] == [True] * 3
    connection = HTTPConnection("127.0.0.1", router.settings.admin_port, timeout=20)
    connection.request("DELETE", "/tenants/d/cache")
    assert connection.getresponse().status == 200
    connection.close()
    assert [known(name) for name in "bcd"] == [True, False, False]
    assert remembered.texts == 1
