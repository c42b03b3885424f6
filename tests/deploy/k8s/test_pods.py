"""What the manifests start works together: a router apart from its workers, prefill and decode in pods of their own, pods that come and go."""

from __future__ import annotations

import random
import re
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import manifests
import pytest
from pods_under_test import Pods
from rendering import Object, pods, variant
from sim_cluster import metric, right
from tests_shared import wait_for

from cachebus import security
from cachebus.zeromq_peers import new_pair
from deploy.client import Answer, ask

ROUTER, PREFILL, DECODE, SECOND, NODE = "127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5", "127.0.0.6"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hs-", dir="/tmp") as made:
        yield Path(made)


@pytest.fixture
def keys(folder: Path) -> Mapping[str, bytes]:
    """The secret's data, as the page has it made."""
    security.begin(folder / "cluster")
    found = {"digest.key": (folder / "cluster" / "digest.key").read_bytes()}
    for name, role in (("nodes", "node"), ("router", "router")):
        own = security.add(folder / "cluster", name, role, new_pair)  # type: ignore[arg-type]
        found |= {f"{name}.{kind}": (own / f"own.{kind}").read_bytes() for kind in ("secret", "public")}
    return found


@pytest.fixture
def cluster(folder: Path, keys: Mapping[str, bytes]) -> Iterator[Pods]:
    made = Pods(variant("cpu-demo"), folder, keys)
    made.resolve(PREFILL, DECODE)
    try:
        for name, workload, address in (("p-0", "prefill", PREFILL), ("d-0", "decode", DECODE), ("r-0", "router", ROUTER)):
            made.start(pod(workload), name, address)
        wait_for(lambda: made.answers(f"http://{ROUTER}:{made.port}/ready") and workers(made) == {"prefill": 1, "decode": 1}, 30)
        yield made
    finally:
        made.stop()


def pod(workload: str) -> Object:
    return dict(pods(variant("cpu-demo")))[f"headstart-{workload}"]


def test_workers_of_a_node_share_its_region(folder: Path, keys: Mapping[str, bytes]) -> None:
    values = {**manifests.overlay_values("cpu-demo"), "nodeShared": {"enabled": True}}
    objects = [found for made in manifests.render(values).values() for found in made]
    of = dict(pods(objects))
    cluster = Pods(objects, folder, keys)
    cluster.resolve(NODE)
    try:
        for name, workload, address in (("c-0", "cachebus", NODE), ("p-0", "prefill", PREFILL), ("d-0", "decode", DECODE), ("r-0", "router", ROUTER)):
            cluster.start(of[f"headstart-{workload}"], name, address)
        wait_for(lambda: cluster.answers(f"http://{ROUTER}:{cluster.port}/ready") and workers(cluster) == {"prefill": 1, "decode": 1}, 30)
        chance = random.Random(3)
        prompt = [chance.randrange(100_000) for _ in range(3000)]
        assert asked(cluster, prompt).headers["x-headstart-route"] == "prefill+decode"
        # What the prefill worker published did not travel: the other one read it where it was written.
        assert metric(f"http://{DECODE}:{cluster.port}", "headstart_pulled_bytes_total") > 0
    finally:
        cluster.stop()


def workers(cluster: Pods) -> dict[str, int]:
    with urllib.request.urlopen(f"http://{ROUTER}:{cluster.port}/metrics", timeout=5) as answer:
        found = re.findall(r'^headstart_workers\{role="(\w+)",state="ready"\} ([0-9.]+)$', answer.read().decode(), re.MULTILINE)
    return {role: int(float(count)) for role, count in found}


def asked(cluster: Pods, prompt: list[int], count: int = 8) -> Answer:
    answer = ask(f"http://{ROUTER}:{cluster.port}", "/v1/completions", {"prompt": prompt, "max_tokens": count})
    assert answer.token_ids == right(prompt, count)
    return answer


def test_prefill_hands_over_to_decode_in_another_pod(cluster: Pods) -> None:
    chance = random.Random(1)
    prompt = [chance.randrange(100_000) for _ in range(3000)]
    cold = asked(cluster, prompt)
    assert (cold.headers["x-headstart-route"], cold.headers["x-headstart-worker"]) == ("prefill+decode", "d-0")
    assert cold.headers["x-headstart-cached-tokens"] == "0"
    again = asked(cluster, prompt)
    assert again.headers["x-headstart-route"] == "decode"
    assert int(again.headers["x-headstart-cached-tokens"]) > 2900
    # All of it was encrypted, and for members only.
    assert all("with keys" in cluster.said(name, "cachebus") for name in ("p-0", "d-0"))


def test_a_pod_that_comes_is_used_and_one_that_goes_is_not(cluster: Pods) -> None:
    chance = random.Random(2)
    prompt = [chance.randrange(100_000) for _ in range(2500)]
    asked(cluster, prompt)
    cluster.start(pod("decode"), "d-1", SECOND)
    cluster.resolve(PREFILL, DECODE, SECOND)
    wait_for(lambda: workers(cluster) == {"prefill": 1, "decode": 2}, 15)
    assert cluster.end("d-0", "decode") == 0
    wait_for(lambda: workers(cluster) == {"prefill": 1, "decode": 1}, 5)
    # What the pod that goes has computed is still there, as long as its cachebus is.
    moved = asked(cluster, prompt)
    assert moved.headers["x-headstart-worker"] == "d-1"
    assert "peer" in moved.headers["x-headstart-cache-source"]
    cluster.end("d-0", "cachebus")
    cluster.resolve(PREFILL, SECOND)
    assert asked(cluster, prompt[:2000]).headers["x-headstart-worker"] == "d-1"
