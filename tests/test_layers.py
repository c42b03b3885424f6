"""The layers, and that nobody else's package stands in for one of ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("package", ["cachebus", "decode", "deploy", "prefill", "router"])
def test_every_package_is_this_repositorys(package: str) -> None:
    """`decode` and `router` are names on the package index, too."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin) == ROOT / package / "__init__.py"


def test_the_layers_hold(capsys: pytest.CaptureFixture[str]) -> None:
    code = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert code == 0, capsys.readouterr().out
