"""The page for newcomers: what it tells to type works."""

from __future__ import annotations

import re

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


def test_the_page_from_top_to_bottom(simulated: Engine) -> None:
    for block in executed(PAGE):
        simulated.run(block.replace("127.0.0.1:8000", f"127.0.0.1:{simulated.environment['HEADSTART_PORT']}"))
    assert simulated.run("podman ps --all --quiet; podman volume ls --quiet").strip() == ""
