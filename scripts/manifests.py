"""Writes what kustomize builds from (deploy/k8s/base, components, files of overlays) out of the Helm chart, so that both are one.

usage: python scripts/manifests.py          (`make manifests`; tests/deploy/k8s fails where it was not run after a change of the chart)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helm_python
import yaml

K8S = Path(__file__).parent.parent / "deploy" / "k8s"
RELEASE, NAMESPACE = "headstart", "headstart"
CHECKSUM = "checksum/config"
"""How the chart restarts pods when the settings change. Kustomize does it by a hash in the ConfigMap's name."""
_HEAD = "# Made from ../chart by scripts/manifests.py.\n"
_COMPONENTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "hpa": ("scaling", {"prefillSpec": {"autoscaling": {"kind": "hpa"}}, "decodeSpec": {"autoscaling": {"kind": "hpa"}}}),
    "keda": ("scaling", {"prefillSpec": {"autoscaling": {"kind": "keda"}}, "decodeSpec": {"autoscaling": {"kind": "keda"}}}),
    "keda-prometheus": (
        "scaling",
        {"prefillSpec": {"autoscaling": {"kind": "keda-prometheus"}}, "decodeSpec": {"autoscaling": {"kind": "keda-prometheus"}}},
    ),
    "podmonitor": ("podmonitor", {"podMonitor": {"enabled": True}}),
    "httproute": ("httproute", {"gateway": {"enabled": True}}),
}
OVERLAYS = ("cpu-demo", "gpu", "node-shared")


def render(values: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The chart's objects by the name of their template."""
    with helm_python.Chart.load(K8S / "chart") as chart:
        rendered = chart.render(values=dict(values), name=RELEASE, namespace=NAMESPACE)
    return {Path(name).stem: [found for found in yaml.safe_load_all(text) if found] for name, text in rendered.items() if name.endswith(".yaml")}


def overlay_values(name: str) -> dict[str, Any]:
    """The values that make the chart's output the overlay's."""
    read: dict[str, Any] = yaml.safe_load((K8S / "chart" / f"values-{name}.yaml").read_text())
    return read


def files() -> Iterator[tuple[str, str]]:
    """Every file that is made, by its path in deploy/k8s."""
    base = render({})
    for template, objects in base.items():
        if template == "config":
            yield "base/headstart.yaml", _HEAD + _settings(objects)
        elif objects:
            yield f"base/{template}.yaml", _text(objects)
    for name, (template, values) in _COMPONENTS.items():
        yield f"components/{name}/{template}.yaml", _text(render(values)[template])
    for name in OVERLAYS:
        yield f"overlays/{name}/headstart.yaml", _HEAD + _settings(render(overlay_values(name))["config"])
    yield "overlays/node-shared/cachebus.yaml", _text(render(overlay_values("node-shared"))["cachebus"])


def _settings(objects: list[dict[str, Any]]) -> str:
    return str(objects[0]["data"]["headstart.yaml"])


def _text(objects: list[dict[str, Any]]) -> str:
    for found in objects:
        template = found["spec"].get("template", {}) if "spec" in found else {}
        annotations = template.get("metadata", {}).get("annotations", {})
        annotations.pop(CHECKSUM, None)
        if not annotations:
            template.get("metadata", {}).pop("annotations", None)
    return _HEAD + yaml.safe_dump_all(objects, sort_keys=False, width=150)


def main() -> None:
    """Writes them all."""
    for name, text in files():
        path = K8S / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
