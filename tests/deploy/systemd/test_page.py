"""The newcomer's page: its commands run or say why not, and it names every unit."""

from __future__ import annotations

from pathlib import Path

import yaml
from page import blocks_of, execute, is_executed
from units import FOLDER, UNITS

PAGE = (FOLDER / "README.md").read_text()


def test_every_command_runs_or_says_why_not(tmp_path: Path) -> None:
    (tmp_path / "deploy").symlink_to(FOLDER.parent)
    execute(PAGE, tmp_path)
    assert yaml.safe_load((tmp_path / "in-force.yaml").read_text())["cache"]["max_local_disk_size"] == 500
    assert [block.splitlines()[0] for block in blocks_of(PAGE) if is_executed(block)] == [
        "headstart config --config deploy/systemd/headstart.yaml > in-force.yaml"
    ]


def test_it_names_every_unit() -> None:
    assert not [name for name in UNITS if name.replace("@.", "@N.") not in PAGE]
