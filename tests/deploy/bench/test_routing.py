"""The routing benchmark: its trace, its verdicts, and a small replay on real processes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cachebus.errors import SettingsError
from deploy import cli
from deploy.bench import routing
from deploy.bench.gateways import Gateway, chosen
from deploy.bench.replay import Pace
from deploy.bench.trace import ceiling, read_trace

LINES = [
    {"timestamp": 5000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 6000, "input_length": 1500, "output_length": 4, "hash_ids": [0, 1, 3]},
    {"timestamp": 6500, "input_length": 600, "output_length": 3, "hash_ids": [9, 1]},
    {"timestamp": 9000, "input_length": 1100, "output_length": 3, "hash_ids": [0, 1, 2]},
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "small.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, LINES)).encode()))
    return path


def test_prompts_begin_alike_where_their_ids_do(trace: Path) -> None:
    first, second, third, again = (arrival.prompt() for arrival in read_trace(trace, 10))
    assert [len(prompt) for prompt in (first, second, third, again)] == [1100, 1500, 600, 1100]
    assert first == again
    assert first[:1024] == second[:1024]
    assert first[1024:] != second[1024:1100]
    assert third[512:600] == first[512:600], "the same id"
    assert third[:512] != first[:512]


def test_the_ceiling_counts_what_came_before_at_the_beginning(trace: Path) -> None:
    arrivals = read_trace(trace, 10)
    assert ceiling(arrivals) == (1024 + 1100) / (1100 + 1500 + 600 + 1100)
    assert ceiling(arrivals[:1]) == 0
    assert [Pace(rate=2, speed=5).due(arrival) for arrival in arrivals] == [0, 0.1, 0.15, 0.4]
    assert len(read_trace(trace, 2)) == 2


@pytest.mark.parametrize("text", ["", "[1]", json.dumps(LINES[0] | {"input_length": 1537})])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(SettingsError, match="not a trace"):
        read_trace(tmp_path / "t.jsonl", 5)
    with pytest.raises(SettingsError, match="No such file"):
        read_trace(tmp_path / "none", 5)


def test_gateways_are_named_with_their_policies() -> None:
    found = chosen("headstart, headstart:round_robin,vllm-router:cache_aware", {"vllm-router": Path("/bin/vr")})
    assert [one.label for one in found] == ["headstart", "headstart round_robin", "vllm-router cache_aware"]
    with pytest.raises(SettingsError, match="none of"):
        chosen("nginx", {"vllm-router": None})
    with pytest.raises(SettingsError, match="--vllm-router"):
        chosen("vllm-router", {"vllm-router": None})


def measured(system: str, policy: str, share: float, ttft: list[float]) -> routing.Measured:
    return routing.Measured(Gateway(system, policy), len(ttft), 0, 0, share, ttft, 0.0, 0.0)


def test_verdicts_name_what_is_missed() -> None:
    ours = measured("headstart", "", 0.94, [1.0, 1.0, 3.0])
    said = routing.verdicts([ours, measured("headstart", "round_robin", 0.9, [2.0, 2.0, 2.0])])
    assert said == [
        "headstart: share of ceiling 0.940, MISSED: at least 0.95",
        "headstart, mean TTFT / headstart round_robin: 0.83",
        "headstart, p99 TTFT / headstart round_robin: 1.50, MISSED: below 1",
    ]
    rows = {row.metric: row for row in routing.rows_of(ours, "m", "case")}
    assert (rows["ttft_seconds"].median, rows["ttft_seconds"].p99, rows["ttft_seconds"].runs) == (1.0, 3.0, 3)
    assert rows["mean_ttft_seconds"].median == pytest.approx(5 / 3, abs=1e-4)
    assert rows["share_of_ceiling"].median == 0.94


def test_a_replay_on_simulated_workers(trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trace.parent)
    command = ["bench", "routing", "--trace", str(trace), "--prefill", "1", "--decode", "2", "--speed", "2", "--region-gb", "0.05", "--json"]
    assert cli.main([*command, "--check", "4", "--output", "out.json", "--logs", "logs"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads(Path("out.json").read_text()) == result
    rows = {row["metric"]: row for row in result["rows"]}
    assert rows["failed_requests"]["median"] == 0
    assert rows["share_of_ceiling"]["median"] == pytest.approx(1, abs=0.03)
    assert 0.01 < rows["ttft_seconds"]["median"] < 5
    assert {row["case"] for row in result["rows"]} == {"small, 1+2 workers, rate 1"}


def test_a_wrong_answer_fails_the_benchmark(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "expected_tokens", lambda *_: [1])
    command = ["bench", "routing", "--trace", str(trace), "--requests", "1", "--prefill", "1", "--decode", "1", "--region-gb", "0.05", "--speed", "5"]
    assert cli.main(command) == 1
