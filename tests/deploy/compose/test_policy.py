"""What every service of the compose files must have: no root, nothing writable, no capability, a pinned image, nothing open to the network."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from containers import ROOT

COMPOSE = ROOT / "compose"
_OWN = re.compile(r"\$\{HEADSTART_IMAGES:-localhost/headstart\}/[a-z-]+:\$\{HEADSTART_TAG:-0\.1\.0\}")
_OTHERS = re.compile(r"\$\{HEADSTART_[A-Z]+_IMAGE:-[a-z/]+:[a-z0-9.-]+@sha256:[0-9a-f]{64}\}")


def services() -> dict[str, dict[str, Any]]:
    """Every service with what it takes from base.yaml."""
    base = yaml.safe_load((COMPOSE / "base.yaml").read_text())["services"]
    found = {}
    for path in COMPOSE.glob("*.yaml"):
        if path.name not in ("base.yaml", "compose.yaml"):
            for name, service in yaml.safe_load(path.read_text())["services"].items():
                found[name] = {**base.get(service.get("extends", {}).get("service"), {}), **service}
    return found


def problems(service: dict[str, Any]) -> list[str]:
    """What a service lacks."""
    found = []
    user = str(service.get("user", "0")).partition(":")[0]
    if not user.isdigit() or user == "0":
        found.append("user")
    if service.get("read_only") is not True:
        found.append("read_only")
    if service.get("cap_drop") != ["ALL"] or service.get("cap_add") or service.get("privileged"):
        found.append("capabilities")
    if "no-new-privileges:true" not in service.get("security_opt", []):
        found.append("no-new-privileges")
    if any(service.get(key) == "host" for key in ("network_mode", "ipc", "pid")):
        found.append("the host's namespaces")
    if not _OWN.fullmatch(service["image"]) and not _OTHERS.fullmatch(service["image"]):
        found.append("image")
    if not all(re.match(r"(127\.0\.0\.1|\$\{HEADSTART_ADDRESS:-127\.0\.0\.1\}):", port) for port in service.get("ports", [])):
        found.append("ports")
    return found


@pytest.mark.parametrize("name", sorted(services()))
def test_services_keep_to_the_policy(name: str) -> None:
    assert problems(services()[name]) == []


def test_all_roles_are_there() -> None:
    assert set(services()) == {"cachebus", "router", "redis", "prefill", "prefill-gpu", "decode", "decode-gpu", "prometheus", "grafana"}


def test_a_careless_service_is_found() -> None:
    careless = {"image": "redis:latest", "ports": ["6379:6379"], "network_mode": "host", "privileged": True}
    assert problems(careless) == ["user", "read_only", "capabilities", "no-new-privileges", "the host's namespaces", "image", "ports"]
