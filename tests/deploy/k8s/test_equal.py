"""Chart and kustomize give the same for the same values, and what is made from the chart is as the chart makes it now."""

from __future__ import annotations

from pathlib import Path

import manifests
import pytest
from rendering import K8S, comparable, kustomize, variant


@pytest.mark.parametrize("name", manifests.OVERLAYS)
def test_an_overlay_is_the_chart_with_its_values(name: str) -> None:
    assert comparable(kustomize(K8S / "overlays" / name)) == comparable(variant(name))


def test_the_base_is_the_chart_as_it_is() -> None:
    assert comparable(kustomize(K8S / "base")) == comparable(variant("defaults"))


@pytest.mark.parametrize("name", ["hpa", "keda-prometheus"])
def test_scaling_is_a_component(tmp_path: Path, name: str) -> None:
    # Kustomize takes paths relative to the file only.
    up = "../" * len(tmp_path.parts)
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{up}{K8S}/base]\ncomponents: [{up}{K8S}/components/{name}]\n".replace("//", "/"))
    assert comparable(kustomize(tmp_path)) == comparable(variant(name))


def test_a_difference_is_seen() -> None:
    changed = variant("defaults")
    next(one for one in changed if one["kind"] == "Deployment")["spec"]["replicas"] += 1
    assert comparable(kustomize(K8S / "base")) != comparable(changed)


@pytest.mark.parametrize(("path", "text"), list(manifests.files()), ids=lambda value: value if value.endswith(".yaml") else "")
def test_what_is_made_is_up_to_date(path: str, text: str) -> None:
    assert (K8S / path).read_text() == text, "run `make manifests`"


def test_pods_start_anew_when_settings_change() -> None:
    def checksum(objects: list[dict[str, object]]) -> set[str]:
        return {line.split()[-1] for line in str(objects).split("'") if len(line) == 64}

    changed = [one for objects in manifests.render({"config": {"router": {"n_max": 7}}}).values() for one in objects]
    assert len(checksum(changed)) == 1
    assert checksum(changed) != checksum(variant("defaults"))
