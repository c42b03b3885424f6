"""What scales the pools is told by somebody: every metric of a trigger or of the page's queries is one that a router or an engine has."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from rendering import K8S, Object, containers, environment, pods, settings_text, variant

from cachebus.settings_file import load_settings
from deploy.settings import Settings
from router.metrics import RouterMetrics
from router.scaler import told
from router.scaling import Reading, decide
from router.scaling_settings import ScalingSettings

_NAME = re.compile(r"\b(?:headstart_|vllm:)\w+")


def known(name: str) -> bool:
    if name.startswith("headstart_"):
        return re.search(rf"^{name}\b", RouterMetrics().exposition([], [], 0.0).decode(), re.MULTILINE) is not None
    vllm = find_spec("vllm")
    assert vllm is not None
    assert vllm.origin is not None
    return f'"{name.removesuffix("_bucket")}"' in (Path(vllm.origin).parent / "v1" / "metrics" / "loggers.py").read_text()


def queries() -> list[str]:
    triggers = [trigger for one in variant("keda-prometheus") if one["kind"] == "ScaledObject" for trigger in one["spec"]["triggers"]]
    page = [line.split("|")[2] for line in (K8S / "README.md").read_text().splitlines() if line.startswith("| `headstart_") and "(" in line]
    assert len(triggers) == len(page) == 3
    return [trigger["metadata"]["query"] for trigger in triggers] + page


@pytest.mark.parametrize("query", queries())
def test_what_is_asked_for_is_told(query: str) -> None:
    names = _NAME.findall(query)
    assert names
    assert all(known(name) for name in names)


def test_what_nobody_tells_would_be_seen() -> None:
    assert not known("headstart_nothing")
    assert not known("vllm:nothing")


def test_each_pool_has_its_own() -> None:
    for kind, name in (("ScaledObject", "gpu"), ("ScaledObject", "keda-prometheus"), ("HorizontalPodAutoscaler", "hpa")):
        targets = {one["metadata"]["name"]: one["spec"]["scaleTargetRef"]["name"] for one in variant(name) if one["kind"] == kind}
        assert targets == {pool: pool for pool in ("headstart-prefill", "headstart-decode")}
        assert all("replicas" not in one["spec"] for one in variant(name) if one["kind"] == "StatefulSet" and one["metadata"]["name"] in targets)


def router(name: str) -> tuple[list[Object], ScalingSettings]:
    """A variant, and the settings that its routers scale by."""
    objects = variant(name)
    (container,) = [one for one in containers(dict(pods(objects))["headstart-router"]) if one["name"] == "router"]
    return objects, load_settings(Settings, settings_text(objects), "headstart.yaml", environment(container, {})).scaling


@pytest.mark.parametrize("name", ["gpu", "keda, tenants"])
def test_keda_asks_the_router_for_what_its_answer_has(name: str) -> None:
    objects, rule = router(name)
    _, sizes = decide(rule, None, Reading(1, 3), 0.0)
    answer = told(sizes, Reading(1, 3))
    (service,) = [one for one in objects if one["kind"] == "Service" and one["metadata"]["name"] == "headstart-router"]
    for one in objects:
        if one["kind"] == "ScaledObject":
            (trigger,) = one["spec"]["triggers"]
            metadata = trigger["metadata"]
            assert metadata["url"] == f"http://{service['metadata']['name']}.headstart.svc:{service['spec']['ports'][0]['port']}/scaling"
            pool, key = metadata["valueLocation"].split(".")
            assert one["metadata"]["name"] == f"headstart-{pool}"
            assert isinstance(answer[pool][key], int)
            assert (metadata["targetValue"], trigger["metricType"]) == ("1", "AverageValue"), "as many workers as the answer says"


def test_the_routers_bounds_are_those_of_the_scaled_objects() -> None:
    objects, rule = router("keda, tenants")
    bounds = {one["metadata"]["name"]: one["spec"] for one in objects if one["kind"] == "ScaledObject"}
    prefill, decode = bounds["headstart-prefill"], bounds["headstart-decode"]
    assert (rule.prefill_min, rule.prefill_max) == (prefill["minReplicaCount"], prefill["maxReplicaCount"]) == (0, 4)
    assert rule.decode_min == decode["minReplicaCount"] == 2
    assert (rule.decode_max, decode["maxReplicaCount"]) == (20, 8), "config wins over what the values make"
    assert (rule.prefill_busy, rule.shrink_seconds) == (0.6, 300)
    assert router("defaults")[1] == ScalingSettings()


def test_with_tenants_keda_brings_an_admins_key_and_without_none() -> None:
    objects, _ = router("keda, tenants")
    (authentication,) = [one for one in objects if one["kind"] == "TriggerAuthentication"]
    triggers = [one["spec"]["triggers"][0] for one in objects if one["kind"] == "ScaledObject"]
    assert [trigger["authenticationRef"]["name"] for trigger in triggers] == [authentication["metadata"]["name"]] * 2
    assert all(trigger["metadata"]["authMode"] == "apiKey" for trigger in triggers)
    # KEDA sends it as x-api-key, which is one of the two headers that the router takes keys in.
    assert authentication["spec"]["secretTargetRef"] == [{"parameter": "apiKey", "name": "admin-key", "key": "key"}]
    assert not [one for one in variant("gpu") if one["kind"] == "TriggerAuthentication" or "authenticationRef" in str(one)]


@pytest.mark.parametrize(("name", "may"), [("gpu", True), ("keda, tenants", True), ("keda-prometheus", False), ("defaults", False)])
def test_keda_reaches_the_router_where_it_asks_it(name: str, may: bool) -> None:
    rules = [one["spec"] for one in variant(name) if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == "headstart-scaling"]
    assert len(rules) == may
    for rule in rules:
        assert rule["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "router"
        assert rule["ingress"][0]["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "keda"}
        assert rule["ingress"][0]["ports"] == [{"port": 8000}]
