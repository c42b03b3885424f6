"""Simulated workers on the test's bus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sim_cluster import SimCluster
from tests_shared import Bus


@pytest.fixture
def sims(bus: Bus, tmp_path: Path) -> Iterator[SimCluster]:
    cluster = SimCluster(bus, tmp_path)
    yield cluster
    cluster.stop()
