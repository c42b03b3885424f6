"""Fixtures of several packages' tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests_shared import Bus


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    """A cache bus that really runs, in a folder of its own."""
    bus = Bus(tmp_path)
    yield bus
    bus.stop()
    bus.daemon._directory.check_integrity()
    bus.holder.close()
