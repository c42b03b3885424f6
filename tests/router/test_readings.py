"""What is read of engines' metrics: in vLLM's own form, and added up over a pool."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from router.readings import EngineReading, Readings, parse


def vllms(*, kv: float = 0.25, blocks: str = "1000", engines: int = 1) -> bytes:
    """An exposition with vLLM's names and labels, made by the same library."""
    registry, labels = CollectorRegistry(), ["model_name", "engine"]
    usage = Gauge("vllm:kv_cache_usage_perc", "", labels, registry=registry)
    running = Gauge("vllm:num_requests_running", "", labels, registry=registry)
    waiting = Gauge("vllm:num_requests_waiting", "", labels, registry=registry)
    by_reason = Gauge("vllm:num_requests_waiting_by_reason", "", [*labels, "reason"], registry=registry)
    ended = Counter("vllm:request_success", "", [*labels, "finished_reason"], registry=registry)
    pace = Histogram("vllm:inter_token_latency_seconds", "", labels, registry=registry)
    config = Info("vllm:cache_config", "", registry=registry)
    config.info({"block_size": "16", "sizes": "{'a': 1}", "num_gpu_blocks": blocks, "num_gpu_blocks_override": "None"})
    for engine in range(engines):
        of = ("some/model", str(engine))
        usage.labels(*of).set(kv)
        running.labels(*of).set(3)
        waiting.labels(*of).set(2)
        by_reason.labels(*of, "capacity").set(7)
        for reason, count in (("stop", 4), ("length", 5)):
            ended.labels(*of, reason).inc(count)
        for seconds in (0.02, 0.04):
            pace.labels(*of).observe(seconds)
    return generate_latest(registry)


def test_vllms_own_form_is_read() -> None:
    assert parse(vllms()) == EngineReading(0.25, 1000, 3, 2, 9, pytest.approx(0.06), 2)
    two = parse(vllms(engines=2))
    assert (two.kv_used, two.running, two.finished) == (0.25, 6, 18)
    assert parse(vllms(blocks="None")).blocks == 0
    assert parse(b"") == parse(b"no metrics\n") == EngineReading()


def test_a_pool_is_its_workers_since_the_last_look() -> None:
    readings = Readings()
    assert readings.look(["a", "b"], 0.8).inter_token_seconds is None
    readings.take("a", EngineReading(0.5, 100, 2, 1, 10, 1.0, 100))
    readings.take("b", EngineReading(0.25, 200, 1, 0, 5, 1.0, 50))
    first = readings.look(["a", "b"], 0.8)
    assert (first.used, first.blocks, first.free, first.running, first.requests) == (0.75, 300, 50 + 150, 3, 4)
    assert (first.finished, first.inter_token_seconds) == (0, None), "nobody knows since when those counts are"
    readings.take("a", EngineReading(0.5, 100, 2, 1, 14, 2.0, 120))
    second = readings.look(["a", "b"], 0.8)
    assert (second.finished, second.inter_token_seconds) == (4, pytest.approx(1.0 / 20))
    readings.take("a", EngineReading(0.5, 100, 2, 1, 2, 0.5, 10))
    again = readings.look(["a", "b"], 0.8)
    assert (again.finished, again.inter_token_seconds) == (2, pytest.approx(0.05)), "an engine that started over counts from nothing"


def test_who_waits_at_a_full_engine_waits_for_blocks() -> None:
    readings = Readings()
    readings.take("full", EngineReading(0.9, 100, 2, 2))
    readings.take("idle", EngineReading(0.1, 100, 1, 4))
    assert readings.look(["full", "idle"], 0.8).used == pytest.approx(1.8 + 0.1)


def test_who_is_gone_is_forgotten() -> None:
    readings = Readings()
    readings.take("a", EngineReading(blocks=100))
    readings.keep(["b"])
    assert readings.look(["a"], 0.8).blocks == 0
