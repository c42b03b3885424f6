"""Tests that need an NVIDIA GPU; elsewhere they are not collected. Their last results are in benchmarks/."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture
def bus_dir(dir_in_memory: Path) -> Path:
    """What the engines register has to lie in memory."""
    return dir_in_memory
