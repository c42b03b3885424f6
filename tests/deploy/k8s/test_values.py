"""The chart's values: what is unknown or impossible is refused in words, and every one is in the schema and means something."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import helm_python
import manifests
import pytest
import yaml
from rendering import K8S

DEFAULTS: dict[str, Any] = yaml.safe_load((K8S / "chart" / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((K8S / "chart" / "values.schema.json").read_text())
FREE = ("config", "resources", "nodeSelector", "podAnnotations", "labels", "clientNamespaceLabels")
"""Keys whose values are Kubernetes' or the settings' own."""


def leaves(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        if isinstance(value, dict) and key not in FREE:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def described(path: tuple[str, ...]) -> dict[str, Any] | None:
    found: dict[str, Any] | None = SCHEMA
    for key in path:
        found = (found or {}).get("properties", {}).get(key)
    return found


def test_helm_finds_nothing_to_say() -> None:
    report = helm_python.lint(str(K8S / "chart"), strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((K8S / "chart" / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == metadata.version("headstart")


def test_schema_and_values_have_the_same_keys() -> None:
    assert not [path for path in leaves(DEFAULTS) if described(path) is None]

    def schema_leaves(schema: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for key, one in schema.get("properties", {}).items():
            yield from schema_leaves(one, (*path, key)) if one.get("properties") else [(*path, key)]

    assert set(schema_leaves(SCHEMA)) - {("global",)} == set(leaves(DEFAULTS))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"modelUrl": "m"}, "modelUrl"),
        ({"decodeSpec": {"replicas": 3}}, "replicas"),
        ({"vllmConfig": {"gpuMemoryUtilization": 1.5}}, "gpuMemoryUtilization"),
        ({"vllmConfig": {"tensorParallelSize": 0}}, "tensorParallelSize"),
        ({"prefillSpec": {"autoscaling": {"kind": "vpa"}}}, "kind"),
        ({"image": {"tag": "latest"}}, "tag"),
        ({"redis": {"image": "valkey/valkey"}}, "image"),
        ({"redis": {"image": "valkey/valkey:latest"}}, "image"),
        ({"cacheConfig": {"cpuOffloadingBufferSize": 0}}, "cpuOffloadingBufferSize"),
    ],
)
def test_what_no_cluster_could_run_with_is_refused(values: dict[str, Any], named: str) -> None:
    with helm_python.Chart.load(K8S / "chart") as chart, pytest.raises(helm_python.HelmError, match=named):
        chart.validate_schema(values)


@pytest.mark.parametrize(
    ("cache", "shared", "said"),
    [
        ({"diskOffloadingBufferSize": 10, "diskHostPath": "/nvme"}, False, "set nodeShared.enabled"),
        ({"diskOffloadingBufferSize": 10}, True, "a DaemonSet makes no claims"),
    ],
)
def test_what_does_not_go_together_is_refused(cache: dict[str, Any], shared: bool, said: str) -> None:
    with pytest.raises(helm_python.HelmError, match=said):
        manifests.render({"cacheConfig": cache, "nodeShared": {"enabled": shared}})


def test_with_tenants_keda_needs_an_admins_key() -> None:
    values = {"prefillSpec": {"autoscaling": {"kind": "keda"}}, "routerSpec": {"tenantsSecretName": "tenants"}}
    with pytest.raises(helm_python.HelmError, match=r"routerSpec\.adminKeySecretName"):
        manifests.render(values)


def other(path: tuple[str, ...], value: Any) -> Any:
    """A value that is not the default one."""
    schema = described(path) or {}
    if "enum" in schema:
        return next(one for one in schema["enum"] if one != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value / 2 if schema["type"] == "number" and value else value + 1
    if isinstance(value, list):
        return [] if value else [{"name": "x", "key": "x", "ports": [{"port": 1}]}] if schema["items"]["type"] == "object" else ["--x"]
    if isinstance(value, dict):
        return {"requests": {"cpu": "7"}} if path[-1] == "resources" else {"router": {"n_max": 7}} if path[-1] == "config" else {"x": "y"}
    return f"x{value}" if not path[-1].startswith(("request", "limit")) or path[-1] == "requestGPUType" else "7"


NEEDS: Mapping[tuple[str, ...], dict[str, Any]] = {
    ("cacheConfig", "diskStorageClass"): {"cacheConfig": {"diskOffloadingBufferSize": 10}},
    ("cacheConfig", "diskHostPath"): {"cacheConfig": {"diskOffloadingBufferSize": 10, "diskHostPath": "/nvme"}, "nodeShared": {"enabled": True}},
    ("nodeShared", "runPath"): {"nodeShared": {"enabled": True}},
    ("nodeShared", "regionPath"): {"nodeShared": {"enabled": True}},
    ("hf_token", "secretKey"): {"hf_token": {"secretName": "token"}},
    ("prefillSpec", "storageClass"): {"prefillSpec": {"pvcStorage": "1Gi"}},
    ("decodeSpec", "storageClass"): {"decodeSpec": {"pvcStorage": "1Gi"}},
    ("podMonitor", "interval"): {"podMonitor": {"enabled": True}},
    ("podMonitor", "labels"): {"podMonitor": {"enabled": True}},
    ("prometheusUrl",): {"prefillSpec": {"autoscaling": {"kind": "keda-prometheus"}}},
    ("networkPolicy", "kedaNamespace"): {"prefillSpec": {"autoscaling": {"kind": "keda"}}},
    ("routerSpec", "adminKeySecretName"): {
        "prefillSpec": {"autoscaling": {"kind": "keda"}},
        "routerSpec": {"tenantsSecretName": "tenants", "adminKeySecretName": "key"},
    },
    ("gateway", "parentRefs"): {"gateway": {"enabled": True}},
    ("gateway", "hostnames"): {"gateway": {"enabled": True}},
    **{
        (pool, "autoscaling", key): {pool: {"autoscaling": {"kind": "keda"}}}
        for pool in ("prefillSpec", "decodeSpec")
        for key in DEFAULTS["prefillSpec"]["autoscaling"] | DEFAULTS["decodeSpec"]["autoscaling"]
        if key != "kind"
    },
}
"""Values that matter only together with others."""


def merged(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    if len(path) == 1:
        return {**values, path[0]: value}
    return {**values, path[0]: merged(values.get(path[0], {}), path[1:], value)}


@pytest.mark.parametrize("path", list(leaves(DEFAULTS)), ids=".".join)
def test_every_value_changes_something(path: tuple[str, ...]) -> None:
    default: Any = DEFAULTS
    for key in path:
        default = default[key]
    base = NEEDS.get(path, {})
    now = base
    for key in path:
        now = now.get(key, default) if isinstance(now, dict) and key in now else default
    changed = merged(base, path, other(path, now))
    assert manifests.render(changed) != manifests.render(base)
