"""How an engine is told to tell of its HBM."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cachebus import zeromq
from cachebus.engine.command import WorkerSpec, engine_command, engine_environment, tokenizer_threads
from cachebus.settings import CacheSettings, ModelSettings, SecuritySettings, WorkerSettings
from cachebus.zeromq_engine import EngineEndpoints


def command(tmp_path: Path, endpoints: EngineEndpoints, *, hbm_events: bool) -> list[str]:
    cache = CacheSettings(hbm_events=hbm_events)
    spec = WorkerSpec("w", "decode", ModelSettings(name="m"), WorkerSettings(), cache, SecuritySettings(), tmp_path)
    return engine_command(spec, 1234, (0, 32, 0), endpoints)


def test_an_engine_publishes_its_events_on_sockets_of_its_own(tmp_path: Path) -> None:
    endpoints = EngineEndpoints.make(tmp_path)
    arguments = command(tmp_path, endpoints, hbm_events=True)
    config = json.loads(arguments[arguments.index("--kv-events-config") + 1])
    assert (config["enable_kv_cache_events"], config["publisher"]) == (True, "zmq")
    assert (config["endpoint"], config["replay_endpoint"]) == (f"ipc://{endpoints.events}", f"ipc://{endpoints.replay}")
    assert "--kv-events-config" not in command(tmp_path, endpoints, hbm_events=False)


def test_the_sockets_fit_wherever_the_bus_does(tmp_path: Path) -> None:
    made = [EngineEndpoints.make(tmp_path) for _ in range(100)]
    paths = {path for endpoints in made for path in (endpoints.events, endpoints.replay)}
    assert len(paths) == 200
    assert max(len(path.name) for path in paths) <= len(zeromq.EVENTS)


def test_what_a_killed_engine_leaves_is_removed(tmp_path: Path) -> None:
    endpoints = EngineEndpoints.make(tmp_path)
    endpoints.events.touch()
    endpoints.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hbm_events", [True, False])
def test_everything_else_is_the_same(tmp_path: Path, hbm_events: bool) -> None:
    arguments = command(tmp_path, EngineEndpoints.make(tmp_path), hbm_events=hbm_events)
    assert {"--kv-transfer-config", "--enable-prefix-caching", "--enable-scale-out"} <= set(arguments)


def test_the_segment_cache_is_before_vllms_own_server(tmp_path: Path) -> None:
    def started(mb: int, tenants_file: str = "") -> list[str]:
        model, security = ModelSettings(name="m", segment_cache_mb=mb), SecuritySettings(tenants_file=tenants_file)
        spec = WorkerSpec("w", "decode", model, WorkerSettings(), CacheSettings(), security, tmp_path)
        return engine_command(spec, 1234, (0, 32, 0), EngineEndpoints.make(tmp_path))

    with_it, without = started(2), started(0)
    at = with_it.index("cachebus.engine.api_server")
    assert json.loads(with_it[at + 1]) == {"bytes_max": 2_000_000, "salted_only": False}
    assert without[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert with_it[at + 2 : at + 6] == without[3:7]
    # A text without a salt may be any tenant's.
    assert json.loads(started(2, "tenants.yaml")[at + 1])["salted_only"] is True


def test_a_long_prompt_does_not_take_all_cores() -> None:
    assert [tokenizer_threads(cpus) for cpus in (1, 2, 4, 8, 64)] == [2, 2, 2, 4, 8]
    assert engine_environment(WorkerSettings(), {})["RAYON_NUM_THREADS"] == str(tokenizer_threads(len(os.sched_getaffinity(0))))
    assert engine_environment(WorkerSettings(), {"RAYON_NUM_THREADS": "1"})["RAYON_NUM_THREADS"] == "1"
