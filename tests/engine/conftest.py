"""The live cluster of the tests with real engines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from live import Live

from deploy.cli import resolved
from deploy.launcher import private_run_dir
from deploy.settings import read_settings

REGION_GB = 0.25
"""Room for about 30,000 tokens of the demo model, so that the tests evict."""


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    # vLLM offers to empty its prefix cache only in this mode.
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    logs: Path = tmp_path_factory.mktemp("logs")
    # Most of these tests are of what is pulled, so their router takes the decode workers in turn.
    overrides = [
        "router.policy=least_loaded",
        "router.port=0",
        # Where a prompt came from is what is tested; three engines on two cores may keep the report waiting.
        "router.report_ms_max=1000",
        "router.prefill_tokens_min=512",
        f"cache.max_local_cpu_size={REGION_GB}",
        "prefill.drain_seconds_max=5",
    ]
    settings = read_settings(None, overrides, {})
    settings = msgspec.structs.replace(settings, model=resolved(settings.model))
    with private_run_dir(settings) as private:
        live = Live(private, logs)
        live.start()
        yield live
        live.stop()
