"""Tenants on a simulated cluster: what one computed no other is given, in no tier; a group shares; router and connector agree on keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from router_under_test import RouterUnderTest
from sim_cluster import SimCluster, right
from tenants_under_test import TenantsUnderTest
from tests_shared import ANSWER_MS, Bus, wait_for

from cachebus.keys import chunk_keys, root_key
from cachebus.messages import Snapshot, SnapshotReply

PROMPT = [number * 7 % 5000 for number in range(1600)]


@pytest.fixture
def sims(bus: Bus, tmp_path: Path) -> Iterator[SimCluster]:
    cluster = SimCluster(bus, tmp_path)
    yield cluster
    cluster.stop()


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
    router = RouterUnderTest(bus, str(tenants.path))
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
