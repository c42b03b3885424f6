"""What the tests of manifests look at: the chart's output, kustomize's, and the containers in them."""

from __future__ import annotations

import copy
import functools
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import manifests
import yaml

Object = dict[str, Any]

ROOT = Path(__file__).parents[3]
K8S = ROOT / "deploy" / "k8s"
KUBECTL = Path(sys.executable).parent / "kubectl"

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "defaults": {},
    **{name: manifests.overlay_values(name) for name in manifests.OVERLAYS},
    "hpa": {"prefillSpec": {"autoscaling": {"kind": "hpa"}}, "decodeSpec": {"autoscaling": {"kind": "hpa"}}},
    "keda-prometheus": {"prefillSpec": {"autoscaling": {"kind": "keda-prometheus"}}, "decodeSpec": {"autoscaling": {"kind": "keda-prometheus"}}},
    "keda, tenants": {
        "prefillSpec": {"autoscaling": {"kind": "keda", "minReplicaCount": 0, "busy": 0.6}},
        "decodeSpec": {"autoscaling": {"kind": "keda", "minReplicaCount": 2, "cooldownPeriod": 120}},
        "routerSpec": {"tenantsSecretName": "tenants", "adminKeySecretName": "admin-key"},
        "config": {"scaling": {"decode_max": 20}},
    },
    "much of it": {
        "image": {"registry": "registry.example/llm", "tag": "1.2.3", "pullSecrets": ["pull"]},
        "name": "chat",
        "vllmConfig": {"tensorParallelSize": 2, "kvCacheDtype": "fp8", "maxModelLen": 65536, "extraArgs": ["--max-num-seqs=64"]},
        "cacheConfig": {"remoteUrl": "rediss://cache.example:6380/0"},
        "prefillSpec": {"requestGPU": 2, "tolerations": [{"key": "gpu", "operator": "Exists"}], "nodeSelector": {"gpu": "h100"}},
        "decodeSpec": {"resources": {"requests": {"cpu": "8", "memory": "64Gi"}, "limits": {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "2"}}},
        "routerSpec": {"tenantsSecretName": "tenants", "podAnnotations": {"team": "llm"}},
        "networkPolicy": {"clientNamespaceLabels": {"llm-client": "true"}, "extraEgress": [{"ports": [{"port": 6380}]}]},
        "config": {"router": {"policy": "prefix_affinity"}},
    },
}


@functools.cache
def _variant(name: str) -> list[Object]:
    return [found for objects in manifests.render(VARIANTS[name]).values() for found in objects]


def variant(name: str) -> list[Object]:
    """The chart's objects for one of VARIANTS; the caller may change them."""
    return copy.deepcopy(_variant(name))


def kustomize(folder: Path) -> list[Object]:
    """What kustomize builds from a folder."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def comparable(objects: list[Object]) -> dict[tuple[str, str], Object]:
    """Objects by kind and name, without how either tool restarts pods when the settings change: a checksum here, a hash in a name there."""
    text = re.sub(r"\b(headstart-config)-[0-9a-z]{10}\b", r"\1", yaml.safe_dump_all(objects))
    found = {}
    for one in yaml.safe_load_all(text):
        template = pod_template(one)
        if template is not None:
            _sort(template["spec"])
            template["metadata"].get("annotations", {}).pop(manifests.CHECKSUM, None)
            if not template["metadata"].get("annotations"):
                template["metadata"].pop("annotations", None)
        if one["kind"] == "ConfigMap":
            one["data"] = {name: yaml.safe_load(content) for name, content in one["data"].items()}
        found[one["kind"], one["metadata"]["name"]] = one
    return found


def _sort(pod: Object) -> None:
    """Puts what has no order by name."""
    pod["volumes"] = sorted(pod.get("volumes", []), key=lambda volume: volume["name"])
    for container in containers(pod):
        container["volumeMounts"].sort(key=lambda mount: mount["name"])
    if not pod.get("initContainers"):
        pod.pop("initContainers", None)


def pod_template(one: Object) -> Object | None:
    """The pod that a workload makes; None for everything else."""
    template: Object | None = one.get("spec", {}).get("template") if one["kind"] in ("Deployment", "StatefulSet", "DaemonSet") else None
    return template


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Workloads' names and the specs of their pods."""
    for one in objects:
        template = pod_template(one)
        if template is not None:
            yield one["metadata"]["name"], template["spec"]


def containers(pod: Object) -> list[Object]:
    """All of a pod's, sidecars and such that only prepare among them."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def mounted_keys(pod: Object, name: str, data: Mapping[str, bytes], folder: Path) -> Path:
    """A secret's data as the volume of a pod shows them."""
    (keys,) = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "keys"]
    assert keys["secretName"] == name
    for item in keys["items"]:
        path = folder / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[item["key"]])
        path.chmod(0o600)
    return folder


def settings_text(objects: list[Object]) -> str:
    """The headstart.yaml of all roles."""
    (config,) = [one for one in objects if one["kind"] == "ConfigMap"]
    return str(config["data"]["headstart.yaml"])


def environment(container: Object, fields: Mapping[str, str]) -> dict[str, str]:
    """A container's variables; ``fields`` are the pod's by their paths. Secrets are left out."""
    found = {}
    for one in container.get("env", []):
        if "value" in one:
            found[one["name"]] = one["value"]
        elif "fieldRef" in one["valueFrom"]:
            found[one["name"]] = fields[one["valueFrom"]["fieldRef"]["fieldPath"]]
    return found
