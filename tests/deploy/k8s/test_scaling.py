"""What scales the pools is told by somebody: every metric of a trigger or of the page's queries is one that a router or an engine has."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from rendering import K8S, variant

from router.metrics import RouterMetrics

_NAME = re.compile(r"\b(?:headstart_|vllm:)\w+")


def known(name: str) -> bool:
    if name.startswith("headstart_"):
        return re.search(rf"^{name}\b", RouterMetrics().exposition([], [], 0.0).decode(), re.MULTILINE) is not None
    vllm = find_spec("vllm")
    assert vllm is not None
    assert vllm.origin is not None
    return f'"{name.removesuffix("_bucket")}"' in (Path(vllm.origin).parent / "v1" / "metrics" / "loggers.py").read_text()


def queries() -> list[str]:
    triggers = [trigger for one in variant("gpu") if one["kind"] == "ScaledObject" for trigger in one["spec"]["triggers"]]
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
    for kind, name in (("ScaledObject", "gpu"), ("HorizontalPodAutoscaler", "hpa")):
        targets = {one["metadata"]["name"]: one["spec"]["scaleTargetRef"]["name"] for one in variant(name) if one["kind"] == kind}
        assert targets == {pool: pool for pool in ("headstart-prefill", "headstart-decode")}
        assert all("replicas" not in one["spec"] for one in variant(name) if one["kind"] == "StatefulSet" and one["metadata"]["name"] in targets)
