"""The simulated day's workers and router against real ones: the same arrivals, the same profile, the same pools."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import msgspec
import pytest

from deploy import cli
from deploy.bench.scaling import LARGE
from deploy.bench.trace import read_trace
from deploy.scaling.replay import Goal, Plant, Replay

SPEED = 10.0


def test_first_tokens_come_as_late_as_on_workers_that_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance, lines = random.Random(5), []
    for number in range(60):
        tokens = chance.choice((2_000, 6_000, 12_000, 24_000))
        ids = [0, 1, *(1000 * number + place for place in range(2, 1 + -(-tokens // 512)))]
        lines.append({"timestamp": 1500 * number, "input_length": tokens, "output_length": 100, "hash_ids": ids})
    trace, profile = tmp_path / "t.jsonl", tmp_path / "p.json"
    trace.write_text("\n".join(map(json.dumps, lines)))
    profile.write_bytes(msgspec.json.encode(LARGE))
    arrivals = read_trace(trace, len(lines))
    day = Replay(Plant(LARGE, 90.0, 8_000_000), Goal(10.0, 0.05, 0.95), (2, 2), None).run(arrivals, arrivals[-1].at_seconds)
    command = ["bench", "routing", "--trace", str(trace), "--prefill", "2", "--decode", "2", "--speed", str(SPEED), "--region-gb", "0.1", "--json"]
    assert cli.main([*command, "--check", "10", "--profile", str(profile)]) == 0
    rows = {row["metric"]: row["median"] for row in json.loads(capsys.readouterr().out)["rows"]}
    print(f"mean TTFT {statistics.fmean(day.ttft):.2f} s simulated, {rows['mean_ttft_seconds']:.2f} s on workers that run")
    assert rows["failed_requests"] == 0
    assert statistics.fmean(day.ttft) == pytest.approx(rows["mean_ttft_seconds"], rel=0.35)
