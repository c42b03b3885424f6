"""Fixtures of several packages' tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests_shared import Bus


@pytest.fixture
def bus_dir(tmp_path: Path) -> Path:
    """Where the bus runs and its region lies."""
    return tmp_path


@pytest.fixture
def dir_in_memory() -> Iterator[Path]:
    """A folder whose files a GPU can register; Linux does not let it have a disk's pages for long."""
    with tempfile.TemporaryDirectory(prefix="headstart-test-", dir="/dev/shm") as made:
        yield Path(made)


@pytest.fixture
def bus(bus_dir: Path) -> Iterator[Bus]:
    """A cache bus that really runs, in a folder of its own."""
    bus = Bus(bus_dir)
    yield bus
    bus.stop()
    bus.daemon._directory.check_integrity()
    bus.holder.close()
