"""The newcomer's page: its commands run, and what they make is what pods need."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import yaml
from page import blocks_of, execute, is_executed
from rendering import K8S, ROOT, comparable, pods, variant

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


def test_the_secret_mounted_as_pods_mount_it_is_a_member_that_knows_itself(done: Path, tmp_path: Path) -> None:
    secret = yaml.safe_load((done / "headstart-keys.yaml").read_text())
    (keys,) = [volume["secret"] for volume in dict(pods(variant("defaults")))["headstart-decode"]["volumes"] if volume["name"] == "keys"]
    assert secret["metadata"]["name"] == keys["secretName"]
    for item in keys["items"]:
        path = tmp_path / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(secret["data"][item["key"]]))
        path.chmod(0o600)
    ring = Keyring(tmp_path)
    assert ring.public_key("nodes") == ring.public
    assert ring.member(ring.public) is not None
