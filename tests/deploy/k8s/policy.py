"""What every manifest keeps to. Each rule takes all objects of a release and names what breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rendering import Object, containers, pod_template, pods

Rule = Callable[[list[Object]], Iterator[str]]

FOLDERS = "folders"
"""The one container of the overlay with hostPath that is root's, to give the host's folders away."""
_RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def _each(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    for name, pod in pods(objects):
        for container in containers(pod):
            yield f"{name}/{container['name']}", container


def _of_ours(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    return ((name, container) for name, container in _each(objects) if container["name"] != FOLDERS)


def non_root(objects: list[Object]) -> Iterator[str]:
    """Nobody is root."""
    for name, pod in pods(objects):
        security = pod.get("securityContext", {})
        if not security.get("runAsNonRoot") or not security.get("runAsUser"):
            yield name
    for name, container in _of_ours(objects):
        security = container.get("securityContext", {})
        if security.get("runAsUser") == 0 or not security.get("runAsNonRoot", True):
            yield name


def no_escalation(objects: list[Object]) -> Iterator[str]:
    """Nobody may get more rights than it began with, nor is privileged."""
    for name, container in _each(objects):
        security = container.get("securityContext", {})
        if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
            yield name


def no_capabilities(objects: list[Object]) -> Iterator[str]:
    """All capabilities are dropped, and none added but one, to the container that gives folders away."""
    for name, container in _each(objects):
        capabilities = container.get("securityContext", {}).get("capabilities", {})
        added = capabilities.get("add", [])
        if capabilities.get("drop") != ["ALL"] or added != (["CHOWN"] if container["name"] == FOLDERS else []):
            yield name


def seccomp(objects: list[Object]) -> Iterator[str]:
    """The runtime's filter of system calls is on."""
    for name, pod in pods(objects):
        profiles = [pod.get("securityContext", {}), *(c.get("securityContext", {}) for c in containers(pod))]
        types = [p["seccompProfile"]["type"] for p in profiles if "seccompProfile" in p]
        if not types or set(types) != {"RuntimeDefault"}:
            yield name


def read_only_root(objects: list[Object]) -> Iterator[str]:
    """Images are not written to."""
    return (name for name, container in _each(objects) if not container.get("securityContext", {}).get("readOnlyRootFilesystem"))


def nothing_of_the_host(objects: list[Object]) -> Iterator[str]:
    """No network, processes or IPC of the host, nor ports of it."""
    for name, pod in pods(objects):
        if any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield name
    for name, container in _each(objects):
        if any("hostPort" in port for port in container.get("ports", [])):
            yield name


def restricted_volumes(objects: list[Object]) -> Iterator[str]:
    """Volumes are of the kinds that Pod Security `restricted` allows."""
    for name, pod in pods(objects):
        for volume in pod.get("volumes", []):
            if not set(volume) - {"name"} <= _RESTRICTED_VOLUMES:
                yield f"{name}: {volume['name']}"


def no_token(objects: list[Object]) -> Iterator[str]:
    """Nobody speaks to Kubernetes, so nobody has a token for it; and no service's address comes as a variable that would be read as a setting."""
    for name, pod in pods(objects):
        if pod.get("automountServiceAccountToken") is not False or pod.get("enableServiceLinks") is not False:
            yield name


def probes(objects: list[Object]) -> Iterator[str]:
    """Whatever runs on has a probe for its start, for its readiness and for its life."""
    for name, container in _of_ours(objects):
        missing = [kind for kind in ("startupProbe", "readinessProbe", "livenessProbe") if kind not in container]
        if missing:
            yield f"{name}: {', '.join(missing)}"


def limits(objects: list[Object]) -> Iterator[str]:
    """Processor and memory are asked for and limited, memory to what is asked for; volumes of the node's have a size."""
    for name, container in _each(objects):
        resources = container.get("resources", {})
        given = [resources.get(kind, {}) for kind in ("requests", "limits")]
        if any(key not in one for one in given for key in ("cpu", "memory")) or given[0]["memory"] != given[1]["memory"]:
            yield name
    for name, pod in pods(objects):
        for volume in pod.get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{name}: {volume['name']}"


def pinned_images(objects: list[Object]) -> Iterator[str]:
    """Every image has a tag that says which one it is."""
    for name, container in _each(objects):
        tag = container["image"].rpartition("/")[2].partition(":")[2]
        if not tag or tag == "latest":
            yield f"{name}: {container['image']}"


def default_deny(objects: list[Object]) -> Iterator[str]:
    """Every pod is selected by a policy that shuts both ways, and nothing is let in from everywhere."""
    policies = [one["spec"] for one in objects if one["kind"] == "NetworkPolicy"]
    for one in objects:
        template = pod_template(one)
        if template is None:
            continue
        own = [p for p in policies if _selects(p["podSelector"], template["metadata"]["labels"])]
        shut = [p for p in own if set(p.get("policyTypes", [])) == {"Ingress", "Egress"}]
        if not any("ingress" not in p for p in shut):
            yield one["metadata"]["name"]
    for policy in policies:
        if any("from" not in rule or "ports" not in rule for rule in policy.get("ingress", [])):
            yield "an ingress rule without peers or ports"
        if any("ports" not in rule for rule in policy.get("egress", [])):
            yield "an egress rule without ports"


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    named = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return named and all(labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", []))


def drains(objects: list[Object]) -> Iterator[str]:
    """Who serves has time to end: more than its containers take, and the router leaves its Service first."""
    for name, pod in pods(objects):
        if pod.get("terminationGracePeriodSeconds", 30) < 60:
            yield name
        for container in pod["containers"]:
            if container["name"] == "router" and "sleep" not in container.get("lifecycle", {}).get("preStop", {}):
                yield f"{name}/router"


RULES: tuple[Rule, ...] = (
    *(non_root, no_escalation, no_capabilities, seccomp, read_only_root, nothing_of_the_host, restricted_volumes, no_token),
    *(probes, limits, pinned_images, default_deny, drains),
)
