"""The newcomer's page: its commands run, and what they make is what pods need."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import yaml
from page import blocks_of, execute, is_executed
from rendering import K8S, ROOT, comparable, containers, mounted_keys, pod_template, pods, variant

from cachebus.security import Keyring

PAGE = (K8S / "README.md").read_text()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all commands of the page were run."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "deploy").symlink_to(ROOT / "deploy")
    execute(PAGE, folder)
    return folder


def test_every_command_runs_or_says_why_not(done: Path) -> None:
    executed = [block for block in blocks_of(PAGE) if is_executed(block)]
    assert len(executed) == 4
    assert all(command in " ".join(executed) for command in ("headstart keys", "kubectl create secret", "kubectl kustomize"))
    assert not [block for block in blocks_of(PAGE) if "kubectl apply" in block and is_executed(block)]


@pytest.mark.parametrize(("name", "file"), [("cpu-demo", "headstart"), ("gpu", "headstart-gpu"), ("node-shared", "headstart-node-shared")])
def test_what_is_applied_is_the_overlay(done: Path, name: str, file: str) -> None:
    assert comparable([one for one in yaml.safe_load_all((done / f"{file}.yaml").read_text()) if one]) == comparable(variant(name))


@pytest.mark.parametrize(("workload", "itself"), [("decode", True), ("router", False)])
def test_the_secret_mounted_as_pods_mount_it_lets_them_know_each_other(done: Path, tmp_path: Path, workload: str, itself: bool) -> None:
    secret = yaml.safe_load((done / "headstart-keys.yaml").read_text())
    data = {key: base64.b64decode(value) for key, value in secret["data"].items()}
    pod = dict(pods(variant("defaults")))[f"headstart-{workload}"]
    ring = Keyring(mounted_keys(pod, secret["metadata"]["name"], data, tmp_path / workload))
    assert (ring.member(ring.public) is not None) == itself
    assert ring.public_key("nodes") == data["nodes.public"]
    router = ring.member(data["router.public"])
    assert itself == (router is not None and router.role == "router")


def asked_for(name: str) -> tuple[float, float]:
    """Processors and GiB that all pods of a variant ask for."""
    units = {"Mi": 1 / 1024, "Gi": 1.0}
    cpus = memory = 0.0
    for one in variant(name):
        template = pod_template(one)
        for container in containers(template["spec"]) if template else []:
            requests, count = container["resources"]["requests"], one["spec"].get("replicas", 1)
            cpu = str(requests["cpu"])
            cpus += count * (float(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu))
            memory += count * float(requests["memory"][:-2]) * units[requests["memory"][-2:]]
    return cpus, memory


def test_what_the_demo_asks_for_is_as_the_page_says() -> None:
    cpus, memory = asked_for("cpu-demo")
    assert f"asks for {cpus:.1f} CPUs and {memory:.1f} GiB of memory" in PAGE
