"""The policy, kept by every variant; each rule is seen to fail."""

from __future__ import annotations

from collections.abc import Callable

import policy
import pytest
from rendering import VARIANTS, Object, pods, variant


@pytest.mark.parametrize("rule", policy.RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_keeps_every_rule(name: str, rule: policy.Rule) -> None:
    found = list(rule(variant(name)))
    if name == "node-shared" and rule is policy.restricted_volumes:
        assert sorted(found) == sorted(
            [f"headstart-{pod}: {volume}" for pod in ("cachebus", "decode", "prefill") for volume in ("run", "region")] + ["headstart-cachebus: nvme"]
        )
        return
    assert not found


def decode(objects: list[Object]) -> Object:
    return dict(pods(objects))["headstart-decode"]


def worker(objects: list[Object]) -> Object:
    container: Object = decode(objects)["containers"][0]
    return container


def sidecar(objects: list[Object]) -> Object:
    container: Object = decode(objects)["initContainers"][0]
    return container


def router(objects: list[Object]) -> Object:
    container: Object = dict(pods(objects))["headstart-router"]["containers"][0]
    return container


def denying(objects: list[Object]) -> Object:
    (found,) = [one for one in objects if one["metadata"]["name"] == "headstart-default-deny"]
    return found


def rule_of(objects: list[Object], name: str, way: str) -> Object:
    (found,) = [one for one in objects if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == name]
    rule: Object = found["spec"][way][0]
    return rule


MUTATIONS: list[tuple[policy.Rule, Callable[[list[Object]], object]]] = [
    (policy.non_root, lambda o: decode(o)["securityContext"].update(runAsUser=0)),
    (policy.non_root, lambda o: decode(o)["securityContext"].pop("runAsNonRoot")),
    (policy.non_root, lambda o: worker(o)["securityContext"].update(runAsUser=0)),
    (policy.non_root, lambda o: sidecar(o)["securityContext"].update(runAsNonRoot=False)),
    (policy.no_escalation, lambda o: worker(o)["securityContext"].pop("allowPrivilegeEscalation")),
    (policy.no_escalation, lambda o: sidecar(o)["securityContext"].update(privileged=True)),
    (policy.no_capabilities, lambda o: worker(o)["securityContext"].pop("capabilities")),
    (policy.no_capabilities, lambda o: worker(o)["securityContext"]["capabilities"].update(add=["IPC_LOCK"])),
    (policy.seccomp, lambda o: decode(o)["securityContext"].pop("seccompProfile")),
    (policy.seccomp, lambda o: worker(o)["securityContext"].update(seccompProfile={"type": "Unconfined"})),
    (policy.read_only_root, lambda o: sidecar(o)["securityContext"].pop("readOnlyRootFilesystem")),
    (policy.nothing_of_the_host, lambda o: decode(o).update(hostIPC=True)),
    (policy.nothing_of_the_host, lambda o: decode(o).update(hostNetwork=True)),
    (policy.nothing_of_the_host, lambda o: worker(o)["ports"][0].update(hostPort=8000)),
    (policy.restricted_volumes, lambda o: decode(o)["volumes"].append({"name": "host", "hostPath": {"path": "/"}})),
    (policy.no_token, lambda o: decode(o).pop("automountServiceAccountToken")),
    (policy.no_token, lambda o: decode(o).pop("enableServiceLinks")),
    (policy.probes, lambda o: worker(o).pop("startupProbe")),
    (policy.probes, lambda o: sidecar(o).pop("readinessProbe")),
    (policy.probes, lambda o: router(o).pop("livenessProbe")),
    (policy.limits, lambda o: worker(o)["resources"].pop("limits")),
    (policy.limits, lambda o: worker(o)["resources"]["requests"].update(memory="1Mi")),
    (policy.limits, lambda o: decode(o)["volumes"].append({"name": "much", "emptyDir": {}})),
    (policy.pinned_images, lambda o: worker(o).update(image="registry:5000/headstart-worker-gpu")),
    (policy.pinned_images, lambda o: worker(o).update(image="headstart-worker-gpu:latest")),
    (policy.default_deny, lambda o: o.remove(denying(o))),
    (policy.default_deny, lambda o: denying(o)["spec"].update(policyTypes=["Ingress"])),
    (policy.default_deny, lambda o: denying(o)["spec"].update(ingress=[{}])),
    (policy.default_deny, lambda o: rule_of(o, "headstart-workers", "ingress").pop("from")),
    (policy.default_deny, lambda o: rule_of(o, "headstart-nodes", "egress").pop("ports")),
    (policy.drains, lambda o: decode(o).pop("terminationGracePeriodSeconds")),
    (policy.drains, lambda o: router(o).pop("lifecycle")),
]


@pytest.mark.parametrize(("rule", "mutate"), MUTATIONS, ids=lambda value: getattr(value, "__name__", None))
def test_every_rule_is_seen_to_fail(rule: policy.Rule, mutate: Callable[[list[Object]], object]) -> None:
    objects = variant("defaults")
    assert not list(rule(objects))
    mutate(objects)
    assert list(rule(objects))


def test_no_rule_is_without_a_manifest_that_breaks_it() -> None:
    assert {rule for rule, _ in MUTATIONS} == set(policy.RULES)


def test_only_the_named_container_may_be_roots_and_only_on_shared_nodes() -> None:
    for name in VARIANTS:
        as_root = [c["name"] for _, pod in pods(variant(name)) for c in pod.get("initContainers", []) if c["name"] == policy.FOLDERS]
        assert as_root == ([policy.FOLDERS] if name == "node-shared" else [])
