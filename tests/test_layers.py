"""The layers, and that nobody else's package stands in for one of ours."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("package", ["cachebus", "decode", "deploy", "prefill", "router"])
def test_every_package_is_this_repositorys(package: str) -> None:
    """`decode` and `router` are names on the package index, too."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin) == ROOT / package / "__init__.py"


def test_the_layers_hold() -> None:
    """In a process of its own: it sets logging up anew, and tests after it would see no log."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
