"""The tiers benchmark: what other tools say is read right, goals are judged, and our own tiers are really moved through."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cachebus.errors import HeadstartError, SettingsError
from cachebus.lanes import Digesting
from cachebus.redis import Remote
from cachebus.settings import CacheSettings
from deploy.bench import tier_goals, tier_lanes, tier_limits, tier_lmcache, tier_nodes, tiers, zeromq_stream
from deploy.bench.report import Row
from deploy.bench.tier_values import GET, PUT, Load, Subject
from deploy.cli import main

SAMPLES = Path(__file__).parent / "samples"
SMALL = Load(1 << 20, 4)


def row(system: str, case: str, metric: str, gigabytes: float, concurrency: int = 1) -> Row:
    return Row("tiers", system, "", "", case, 0, concurrency, metric, gigabytes * 1e9, gigabytes * 1e9, 1)


def test_fio_after_its_warnings() -> None:
    text = (SAMPLES / "fio.txt").read_text()
    assert tier_limits.fio_speed(text, "write") == 1_677_721_600
    assert tier_limits.fio_speed(text, "read") == 0


def test_redis_benchmark() -> None:
    text = (SAMPLES / "redis-benchmark.csv").read_text()
    assert tier_limits.redis_rate(text, "set") == 379.87
    assert tier_limits.redis_rate(text, "get") == 505.69
    with pytest.raises(HeadstartError, match="nothing of incr"):
        tier_limits.redis_rate(text, "incr")


def test_lmcache() -> None:
    text = (SAMPLES / "lmcache-l2.json").read_text()
    found = tier_lmcache.speeds(text, 1 << 20)
    assert {metric: round(value / 2**20, 1) for metric, value in found.items()} == {PUT: 888.9, GET: 1126.8}
    assert found[PUT] / 2**20 == pytest.approx(json.loads(text)["metrics"]["op_0"]["throughput_avg_mbps"], rel=0.01)


@pytest.mark.parametrize(("key", "value"), [("total_success", 3), ("rounds_timed_out", 1)])
def test_what_lmcache_did_not_move_does_not_count(key: str, value: int) -> None:
    result = json.loads((SAMPLES / "lmcache-l2.json").read_text())
    result["metrics"]["op_2"][key] = value
    with pytest.raises(HeadstartError, match="moved"):
        tier_lmcache.speeds(json.dumps(result), 1 << 20)


def test_goals_are_held_against_the_best_that_the_limit_reached() -> None:
    rows = [
        row(tier_goals.OURS, "nvme, 4 MiB", GET, 0.9),
        row(tier_goals.FIO, "nvme, 4 MiB", GET, 1.0),
        row(tier_goals.OURS, "redis, 4 MiB", PUT, 1.5),
        row(tier_goals.REDIS_BENCHMARK, "redis, 4 MiB", PUT, 1.0, 1),
        row(tier_goals.REDIS_BENCHMARK, "redis, 4 MiB", PUT, 2.0, 2),
        row(tier_goals.LMCACHE, "redis, 4 MiB", PUT, 1.5),
        row(tier_goals.ZEROMQ, "peer, 4 MiB", GET, 3.0),
    ]
    assert [(o.case, o.metric, o.system, o.share, o.reached) for o in tier_goals.outcomes(rows)] == [
        ("nvme, 4 MiB", GET, "fio", 0.9, True),
        ("redis, 4 MiB", PUT, "lmcache", 1.0, True),
        ("redis, 4 MiB", PUT, "redis-benchmark", 0.75, False),
    ]
    assert tier_goals.table(rows).splitlines()[2:] == [
        "| nvme, 4 MiB, get | 0.90 | 1.00 | - | - | - |",
        "| redis, 4 MiB, put | 1.50 | - | 2.00 | 1.50 | - |",
        "| peer, 4 MiB, get | - | - | - | - | 3.00 |",
    ]


def test_sizes_and_bounds() -> None:
    assert tiers.chosen_loads("4,32", 1.0) == [Load(4 << 20, 236), Load(32 << 20, 28)]
    assert tiers.chosen_loads("0.5", 0.0) == [Load(1 << 19, 4)]
    for wrong in ("", "big", "0", "0.001", "-4"):
        with pytest.raises(SettingsError, match="--chunk-mb"):
            tiers.chosen_loads(wrong, 1.0)


def test_each_is_first_once_among_those_it_is_compared_with() -> None:
    a, b, c, d = (Subject(name, case, {}, dict) for name, case in (("a", "peer"), ("b", "nvme"), ("c", "peer, CURVE"), ("d", "peer")))
    assert [tiers.in_turn([a, b, c, d], number) for number in range(3)] == [[a, c, d, b], [c, d, a, b], [d, a, c, b]]


@pytest.fixture
def redis_url(tmp_path: Path) -> object:
    folder = tmp_path / "redis"
    folder.mkdir()
    with tier_limits.redis_server(folder) as port:
        yield f"redis://127.0.0.1:{port}/0"


def named(subjects: list[Subject], system: str, case: str) -> Subject:
    return next(subject for subject in subjects if (subject.system, subject.case) == (system, case))


def test_our_tiers_are_moved_through(tmp_path: Path, redis_url: str) -> None:
    with tier_lanes.subjects(SMALL, tmp_path / "disk", redis_url) as subjects:
        for subject in subjects:
            assert all(speed > 0 for speed in subject.measure().values()), subject
        assert {(s.system, s.case) for s in subjects} >= {("headstart", tier) for tier in ("dram", "nvme", "redis")}
    assert not (tmp_path / "disk" / "fio").exists()


def test_what_is_not_what_was_written_fails_unless_nobody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tier_lanes.subjects(SMALL, tmp_path / "disk", "") as subjects:
        named(subjects, "headstart", "nvme").measure()
        monkeypatch.setattr(Digesting, "gives", lambda *_: False)
        with pytest.raises(HeadstartError, match="read on nvme failed"):
            named(subjects, "headstart", "nvme").measure()
        assert named(subjects, "headstart, unchecked", "nvme").measure()[GET] > 0


def test_a_refused_write_is_no_measurement(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Remote, "put_all", lambda _, chunks: [False] * len(chunks))
    with tier_lanes.subjects(SMALL, tmp_path / "disk", redis_url) as subjects, pytest.raises(HeadstartError, match="write on redis failed"):
        named(subjects, "headstart", "redis").measure()


@pytest.mark.parametrize("keys", [False, True])
def test_a_node_pulls_from_another_again_and_again(keys: bool) -> None:
    with tier_nodes.two_nodes(SMALL, keys=keys) as measure:
        assert [measure()[GET] > 0 for _ in range(3)] == [True] * 3


@pytest.mark.parametrize(
    ("system", "case"), [(tier_goals.ZEROMQ, "peer"), (tier_goals.ZEROMQ_OWN_MEMORY, "peer"), (tier_goals.ZEROMQ, "peer, CURVE")]
)
def test_the_bare_stream(system: str, case: str) -> None:
    streams = [subject for subject in tier_limits.zeromq_streams(SMALL) if (subject.system, subject.case) == (system, case)]
    assert [subject.concurrency for subject in streams] == [{GET: 1}, {GET: CacheSettings().peer_streams}]
    assert all(subject.measure()[GET] > 0 for subject in streams)


@pytest.mark.parametrize(("memory", "count"), [("one", 1), ("own", 3)])
def test_the_bare_streams_memory(memory: str, count: int) -> None:
    buffers = zeromq_stream.buffers(4096, 3, memory)
    for number, buffer in enumerate(buffers):
        buffer[:] = bytes([number]) * 4096
    assert [bytes(buffer) for buffer in buffers] == [bytes([number]) * 4096 for number in range(count)]


@pytest.mark.skipif(not (shutil.which("fio") and shutil.which("redis-benchmark")), reason="needs fio and redis-benchmark")
def test_the_hosts_limits(tmp_path: Path, redis_url: str) -> None:
    port = int(redis_url.rpartition(":")[2].partition("/")[0])
    for subject in [*tier_limits.fio(SMALL, tmp_path), *tier_limits.redis_benchmark(SMALL, "127.0.0.1", port)]:
        assert all(speed > 0 for speed in subject.measure().values()), subject


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tiers.json"
    arguments = ["bench", "tiers", "--chunk-mb", "1", "--gb", "0.004", "--runs", "1", "--folder", str(tmp_path), "--json", "--output", str(output)]
    assert main(arguments) == 0
    said = capsys.readouterr()
    rows = json.loads(said.out)["rows"]
    assert json.loads(output.read_text())["rows"] == rows
    assert {(r["case"], r["metric"]) for r in rows if r["system"] == "headstart"} == {
        (f"{tier}, 1 MiB", metric) for tier in ("dram", "nvme", "redis") for metric in (PUT, GET)
    } | {(f"{tier}, 1 MiB", GET) for tier in ("peer", "peer, CURVE")}
    assert "no LMCache: left out" in said.err
    assert "peer, 1 MiB, get / zeromq:" in said.err
    assert "peer, 1 MiB, get / zeromq, own memory:" in said.err
    assert list(tmp_path.iterdir()) == [output]


def test_a_python_without_lmcache_is_said_before_anything_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "tiers", "--lmcache-python", str(tmp_path / "nothing")]) == 2
    assert "can't import LMCache" in capsys.readouterr().err
