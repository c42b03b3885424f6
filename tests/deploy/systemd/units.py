"""Reads unit files: sections of keys that may come several times."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from pathlib import Path

FOLDER = Path(__file__).parents[3] / "deploy" / "systemd"
UNITS = {path.name: path for path in sorted(FOLDER.glob("*.service"))}
SPECIFIERS = {"%i": "0", "%H": "gpu7.example", "%%": "%"}

Unit = dict[str, dict[str, list[str]]]


def read(path: Path) -> Unit:
    """A unit's values by section and key."""
    found: Unit = {}
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), defaultdict(list))
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section[key].append(value)
    return found


def expanded(text: str) -> str:
    """What systemd makes of a value."""
    return re.sub(r"%.", lambda found: SPECIFIERS[found[0]], text)


def command(unit: Unit) -> list[str]:
    """The argument vector that a service runs."""
    (line,) = unit["Service"]["ExecStart"]
    return shlex.split(expanded(line))


def environment(unit: Unit) -> dict[str, str]:
    """The variables that it sets."""
    pairs = [pair for line in unit["Service"]["Environment"] for pair in shlex.split(expanded(line))]
    return dict(pair.split("=", 1) for pair in pairs)
