"""The units: systemd takes them, their commands parse, they drain, and what they cut off is not what a role needs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from units import FOLDER, UNITS, Unit, command, environment, read

from cachebus.settings_file import load_settings
from deploy.cli import _parser
from deploy.settings import Settings

EXPOSURE_MAX = 4.0
"""systemd's own figure for what a service could reach: 10 is everything."""
WORKERS = ("headstart-decode@.service", "headstart-prefill@.service")


def here(path: Path, folder: Path, changed: str = "") -> Path:
    """The unit with the command of this environment, since what a unit starts has to be there."""
    made = folder / path.name
    made.write_text((changed or path.read_text()).replace("/opt/headstart/bin/headstart", str(Path(sys.executable).parent / "headstart")))
    return made


def verify(paths: list[Path]) -> str:
    done = subprocess.run(["systemd-analyze", "verify", *paths], capture_output=True, text=True, timeout=60, check=False)
    return done.stderr + ("" if done.returncode == 0 else "failed")


def exposure(path: Path) -> float:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None
    return float(found[1])


def test_there_is_a_unit_for_each_role() -> None:
    assert set(UNITS) == {"headstart-cachebus.service", *WORKERS, "headstart-router.service"}


def test_systemd_takes_them(tmp_path: Path) -> None:
    assert verify([here(path, tmp_path) for path in UNITS.values()]) == ""


def test_systemd_would_name_a_mistake(tmp_path: Path) -> None:
    path = UNITS["headstart-router.service"]
    assert "Restartt" in verify([here(path, tmp_path, path.read_text().replace("Restart=", "Restartt="))])


@pytest.mark.parametrize("name", UNITS)
def test_what_they_could_reach_is_little(name: str, tmp_path: Path) -> None:
    assert exposure(here(UNITS[name], tmp_path)) <= EXPOSURE_MAX
    bare = re.sub(r"\n# What it does not need.*?\n\n", "\n\n", UNITS[name].read_text(), flags=re.DOTALL)
    assert exposure(here(UNITS[name], tmp_path, bare)) > EXPOSURE_MAX


@pytest.mark.parametrize("name", UNITS)
def test_commands_parse_and_settings_are_taken(name: str) -> None:
    unit = read(UNITS[name])
    role = re.sub(r"headstart-(\w+)@?\.service", r"\1", name)
    options = _parser().parse_args(command(unit)[1:])
    assert (options.command, str(options.config)) == (role, "/etc/headstart/headstart.yaml")
    settings = load_settings(Settings, (FOLDER / "headstart.yaml").read_text(), "headstart.yaml", environment(unit))
    assert settings.cache.run_dir == "/run/headstart"
    assert settings.cache.local_disk.startswith("/var/lib/headstart/")
    drains = {"prefill": settings.prefill.drain_seconds_max, "decode": settings.decode.drain_seconds_max, "router": settings.router.drain_seconds_max}
    assert int(unit["Service"]["TimeoutStopSec"][0]) >= drains.get(role, 0) + 60
    if role in ("prefill", "decode"):
        assert options.name == f"{role}-gpu7.example-0"


KEPT: list[tuple[str, Callable[[Unit], bool]]] = [
    # Otherwise systemd would send SIGTERM to the engine, too, and nothing would drain.
    (WORKERS[0], lambda unit: unit["Service"]["KillMode"] == ["mixed"]),
    (WORKERS[1], lambda unit: unit["Service"]["KillMode"] == ["mixed"]),
    # What would keep a GPU's device files from a worker: ProtectClock= does it through the DeviceAllow= that it implies.
    *((name, lambda unit: not {"ProtectClock", "PrivateDevices", "DeviceAllow", "DevicePolicy"} & set(unit["Service"])) for name in WORKERS),
    # A worker that is told that its cachebus ends would end as well.
    *((name, lambda unit: not {"Requires", "BindsTo", "PartOf", "Requisite"} & set(unit["Unit"])) for name in (*WORKERS, "headstart-router.service")),
    *((name, lambda unit: unit["Unit"]["After"][0].startswith("headstart-cachebus.service")) for name in (*WORKERS, "headstart-router.service")),
    *((name, lambda unit: unit["Service"]["ReadWritePaths"] == ["-/run/headstart"]) for name in (*WORKERS, "headstart-router.service")),
    # Holders' locks and sockets have to be there for the next cachebus.
    ("headstart-cachebus.service", lambda unit: unit["Service"]["RuntimeDirectoryPreserve"] == ["yes"]),
    *((name, lambda unit: unit["Service"]["User"] == ["headstart"]) for name in UNITS),
    *((name, lambda unit: unit["Service"]["Type"] == ["notify"]) for name in UNITS),
    # Otherwise the region would go with the last process of its user.
    *((name, lambda unit: unit["Service"]["RemoveIPC"] == ["no"]) for name in UNITS),
]


@pytest.mark.parametrize(("name", "holds"), KEPT)
def test_what_a_role_needs_is_kept(name: str, holds: Callable[[Unit], bool]) -> None:
    assert holds(read(UNITS[name]))
