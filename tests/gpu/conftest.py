"""Tests that need an NVIDIA GPU; elsewhere they are not collected. Their last results are in benchmarks/."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
