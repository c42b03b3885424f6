"""The page for newcomers: what it tells to type works."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from compose_page import PAGE, blocks_of, executed, not_executed
from containers import ROOT, Engine

COMPOSE = ROOT / "compose"


def test_every_block_is_executed_or_says_why_not() -> None:
    # Other fences would go by unseen.
    assert set(re.findall(r"^```(\w*)$", PAGE, re.MULTILINE)) == {"sh", ""}
    assert len(executed(PAGE)) >= 8
    assert not not_executed("docker compose up\n")
    assert not not_executed("# not executed here:\ndocker compose up\n")
    assert [block.splitlines()[1].split()[:2] for block in blocks_of(PAGE) if not_executed(block)] == [
        ["docker", "build"],
        ["docker", "compose"],
        ["docker", "compose"],
        ["docker", "build"],
    ]


def test_every_variable_is_on_the_page() -> None:
    used = {name for path in COMPOSE.glob("*.yaml") for name in re.findall(r"\$\{(HEADSTART_\w+)", path.read_text())}
    told = set(re.findall(r"`(HEADSTART_\w+)`", PAGE))
    assert used - told == {"HEADSTART_PROMETHEUS_PORT", "HEADSTART_GRAFANA_PORT"}
    assert told <= used


def test_every_file_is_included() -> None:
    included = set(yaml.safe_load((COMPOSE / "compose.yaml").read_text())["include"])
    assert included == {path.name for path in COMPOSE.glob("*.yaml")} - {"compose.yaml", "base.yaml"}


_LOOK = """
import importlib.util, json, os
wanted = ("torch", "vllm", "pip")
parts = json.load(open("/usr/share/headstart/sbom.json"))["components"]
there = [name for name in wanted if importlib.util.find_spec(name)]
print(json.dumps({"user": os.getuid(), "there": there, "parts": [part["name"].lower().replace("_", "-") + "==" + part["version"] for part in parts]}))
"""


@pytest.mark.parametrize("image", ["router", "cachebus"])
def test_small_images_have_what_the_lock_names_and_no_root(simulated: Engine, image: str) -> None:
    run = ["podman", "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--network", "none", "--cap-drop", "ALL"]
    name = f"localhost/headstart/{image}:0.1.0"
    seen = json.loads(simulated.run([*run, "--entrypoint", "python3", name, "-c", _LOOK]))
    assert (seen["user"], seen["there"]) == (10001, [])
    locked = re.findall(r"^([A-Za-z0-9._-]+==[^ ]+) ", (ROOT / "deploy" / "images" / "locks" / "light.txt").read_text(), re.MULTILINE)
    # Headstart itself is what the list is of, or one of its parts.
    assert {part for part in seen["parts"] if not part.startswith("headstart==")} == {text.lower() for text in locked}
    assert simulated.run([*run, name, "--version"]).startswith("headstart ")
    with pytest.raises(AssertionError, match="Read-only file system"):
        simulated.run([*run, "--user", "0", "--entrypoint", "touch", name, "/opt/headstart/changed"])


def test_the_page_from_top_to_bottom(simulated: Engine) -> None:
    for block in executed(PAGE):
        simulated.run(block.replace("127.0.0.1:8000", f"127.0.0.1:{simulated.environment['HEADSTART_PORT']}"))
    assert simulated.run("podman ps --all --quiet; podman volume ls --quiet").strip() == ""
