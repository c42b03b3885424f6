"""What benchmarks do around engines: their options, and the wait for what they hold."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from cachebus import holder
from cachebus.errors import SettingsError
from cachebus.holder import Holder
from deploy.bench import engines
from deploy.bench.engines import Place
from deploy.settings import read_settings


def place(tmp_path: Path, kv_cache_bytes: int) -> Place:
    settings = read_settings(None, ["prefill.kv_cache_gb=3", "model.max_model_len=2048"], {})
    return Place(settings, tmp_path, kv_cache_bytes=kv_cache_bytes)


def test_a_region_that_is_still_held_is_waited_for(tmp_path: Path) -> None:
    held = Holder(tmp_path)
    threading.Timer(0.3, held.close).start()
    started = time.monotonic()
    engines.await_released(tmp_path)
    assert time.monotonic() - started >= 0.25
    assert not holder.living(tmp_path)


def test_a_budget_in_bytes_takes_the_place_of_whole_gibibytes(tmp_path: Path) -> None:
    held, free = place(tmp_path, 5_000_000), place(tmp_path, 0)
    assert engines.engine_options(held, None)["kv_cache_memory_bytes"] == 5_000_000
    assert engines.environment(held)["VLLM_CPU_KVCACHE_SPACE"] is None
    assert "kv_cache_memory_bytes" not in engines.engine_options(free, None)
    assert engines.environment(free)["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert engines.engine_options(free, None)["max_model_len"] == 2048


def test_an_unknown_system_is_refused() -> None:
    assert engines.chosen("vllm,headstart", ["vllm", "headstart"]) == ["vllm", "headstart"]
    with pytest.raises(SettingsError, match="'control' is unknown; there are: vllm"):
        engines.chosen("vllm,control", ["vllm"])
