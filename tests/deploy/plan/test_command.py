"""``headstart plan`` as people and programs call it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy import cli

ROOT = Path(__file__).parents[3]
KNOWN = ("--rate", "0.1", "--prompt-tokens", "131072", "--cold-seconds", "11", "--hit-seconds", "1.5", "--reuse", "0.8", "--gpu-price", "5.72")
LONG = ("--rate", "2", "--prompt-tokens", "131072", "--output-tokens", "300", "--prefix-tokens", "130560", "--prefixes", "40")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert cli.main(["plan", *arguments, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    try:
        assert cli.main(["plan", *arguments]) == 2
    except SystemExit as ended:
        assert ended.code == 2
    said = capsys.readouterr()
    assert not said.out
    return said.err


def test_the_known_example_through_the_real_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy", "plan", *KNOWN]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    assert shown.stderr == ""
    row = next(line for line in shown.stdout.splitlines() if line.startswith("1,000 prompts"))
    assert row.split()[-2:] == ["$17.47", "$5.40"]
    assert shown.stdout.startswith("The cache pays: ")


def test_the_known_example_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *KNOWN)
    assert found["dollars_per_1000_prompts"] == {"without_cache": pytest.approx(17.4778, abs=1e-4), "with_cache": pytest.approx(5.4022, abs=1e-3)}
    assert found["hit_share"] == pytest.approx(0.8, abs=2e-4)
    assert found["with_cache"]["worker_seconds_per_prompt"] == pytest.approx(3.4, abs=1e-3)
    assert found["with_cache"]["ttft_seconds"]["hit"]["mean"] == pytest.approx(1.5, abs=0.02)
    assert found["with_cache"]["gpus"] < found["without_cache"]["gpus"]
    origins = {one["what"]: one["origin"] for one in found["assumptions"]}
    assert (origins["a cold prompt"], origins["GPU price"], origins["hand-over to decode"], origins["a decode step"]) == (
        "given",
        "given",
        "measured",
        "rule",
    )
    # Nothing of it is a constant of the example.
    other = planned(capsys, *KNOWN[:-1], "2.86")
    assert other["dollars_per_1000_prompts"]["with_cache"] == pytest.approx(5.4022 / 2, abs=1e-3)


def test_more_reuse_is_cheaper_and_both_sides_keep_one_objective(capsys: pytest.CaptureFixture[str]) -> None:
    little, much = (planned(capsys, *LONG, "--reuse", reuse) for reuse in ("0.3", "0.9"))
    assert little["objective"] == much["objective"]
    assert little["without_cache"] == much["without_cache"]
    assert much["with_cache"]["gpus"] < little["with_cache"]["gpus"] < little["without_cache"]["gpus"]
    for found in (little, much):
        for side in ("without_cache", "with_cache"):
            one = found[side]
            assert one["ttft_seconds"]["all"]["p99"] <= found["objective"]["ttft_p99"]
            less = one["ttft_seconds_one_prefill_worker_less"]["p99"]
            assert less is None or less > found["objective"]["ttft_p99"]
            dollars = sum(one["dollars_per_hour"].values())
            assert one["dollars_per_million_tokens"] == pytest.approx(dollars / (2 * (131_072 + 300) * 3600) * 1e6)
            assert one["gpus"] == one["prefill"]["workers"] + one["decode"]["workers"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--rate", "20", "--prompt-tokens", "512", "--reuse", "0.9"), "to compute the 512 tokens that are known takes"),
        (("--rate", "20", "--prompt-tokens", "8192"), "no prompt begins like another one"),
        (("--rate", "20", "--prompt-tokens", "8192", "--reuse", "0.02"), "as many GPUs, and first tokens come no 10% sooner"),
        (
            ("--rate", "2", "--prompt-tokens", "65536", "--reuse", "0.8", "--dram-gb", "5", "--nvme-gb", "0", "--redis-gb", "0"),
            "gone from every tier",
        ),
    ],
)
def test_it_says_where_the_cache_does_not_pay(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], why: str) -> None:
    found = planned(capsys, *arguments, code=1)
    assert found["verdict"].startswith("does not pay: ")
    assert why in found["verdict"]
    assert not found["pays"]
    assert found["with_cache"]["gpus"] == found["without_cache"]["gpus"]


def test_an_objective_that_only_the_cache_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *LONG, "--reuse", "0.9", "--ttft-mean", "4")
    assert found["without_cache"] is None
    assert found["verdict"] == "pays: without the cache no number of workers keeps the objective"
    assert "without any waiting it is mean 10.4 s" in found["unreachable"]
    assert found["with_cache"]["ttft_seconds"]["all"]["mean"] <= 4
    none = planned(capsys, *LONG, "--reuse", "0.9", "--ttft-mean", "0.1", code=1)
    assert none["with_cache"] is None
    assert none["verdict"].startswith("can't be planned")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rate", "-1", "--prompt-tokens", "100"), "--rate: -1: give more than 0"),
        (("--rate", "nan", "--prompt-tokens", "100"), "--rate: nan is no amount"),
        (("--rate", "1", "--prompt-tokens", "0"), "--prompt-tokens: 0: give at least 1"),
        (("--rate", "1", "--prompt-tokens", "100", "--reuse", "1.1"), "--reuse: 1.1: a share is 0 to 1"),
        (("--rate", "1", "--prompt-tokens", "100", "--prefix-tokens", "101"), "--prefix-tokens 101: more than a prompt has"),
        (("--rate", "1", "--prompt-tokens", "100", "--dram-gb", "-5"), "--dram-gb: -5: give 0 or more"),
        (("--rate", "1"), "give --rate and --prompt-tokens, or --trace"),
        (("--rate", "1", "--prompt-tokens", "100", "--gpu", "voodoo2"), "--gpu voodoo2: none of a100"),
        (("--rate", "1", "--prompt-tokens", "100", "--model", "none"), "--model none: none of llama-3.2-1b"),
        (("--rate", "1", "--prompt-tokens", "100", "--tp", "3"), "--tp 3: llama-3.1-8b has 32 heads"),
        (("--rate", "1", "--prompt-tokens", "200000"), "llama-3.1-8b takes 131,072"),
        (("--rate", "1", "--prompt-tokens", "8000", "--model", "llama-3.1-70b"), "does not fit a worker: 141.1 GB of weights and 2.7 GB of KV"),
        (("--rate", "1", "--prompt-tokens", "8000", "--model", "llama-3.1-405b", "--gpu", "l4"), "take a larger GPU"),
        (("--rate", "1", "--prompt-tokens", "8000", "--itl-ms", "1"), "--itl-ms 1: a token takes"),
        (("--trace", "none.jsonl"), "--trace none.jsonl: No such file"),
        (("--trace", "t", "--reuse", "0.5"), "--trace has lengths and reuse"),
        (("--rate", "1", "--prompt-tokens", "100", "--measured", "none.json"), "--measured none.json: No such file"),
        (("--rate", "1", "--prompt-tokens", "100", "--measured", "m", "--cold-seconds", "1"), "give one of these three"),
        (("--rate", "1", "--prompt-tokens", "9000", "--prefix-tokens", "1000", "--hit-seconds", "0.1"), "computing the 8000 other tokens takes"),
    ],
)
def test_nonsense_is_named(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    assert said in refused(capsys, *arguments)


def test_a_model_that_does_not_fit_does_on_as_many_gpus_as_are_advised(capsys: pytest.CaptureFixture[str]) -> None:
    large = ("--rate", "4", "--prompt-tokens", "32000", "--reuse", "0.8", "--model", "llama-3.1-70b")
    assert "give --tp 2 or --weights fp8" in refused(capsys, *large)
    found = planned(capsys, *large, "--tp", "2")
    assert found["with_cache"]["gpus"] == 2 * (found["with_cache"]["prefill"]["workers"] + found["with_cache"]["decode"]["workers"])
    assert planned(capsys, *large, "--weights", "fp8")["with_cache"]["gpus"] < found["with_cache"]["gpus"]


def test_measured_times_take_the_place_of_computed_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = json.loads((ROOT / "benchmarks/h200/hits.json").read_text())
    traffic = ("--rate", "2", "--prompt-tokens", "32768", "--reuse", "0.5")
    found = planned(capsys, *traffic, "--measured", str(ROOT / "benchmarks/h200/hits.json"))
    assert found["without_cache"]["worker_seconds_per_prompt"] == pytest.approx(1.1842, abs=1e-4)
    assert found["with_cache"]["worker_seconds_per_prompt"] == pytest.approx((1.1842 + 0.121) / 2, abs=1e-3)
    only_cold = [row for row in rows["rows"] if row["case"] == "cold"]
    Path("cold.json").write_text(json.dumps({"rows": only_cold}))
    assert "no times to first token" in refused(capsys, *traffic, "--measured", "cold.json")


def test_a_trace_brings_its_rate_and_reuse(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = []
    for number in range(200):
        conversation, turn = number % 40, number // 40
        ids = [conversation * 1000 + block for block in range(20 * (turn + 1))]
        lines.append({"timestamp": number * 500, "input_length": len(ids) * 512, "output_length": 100, "hash_ids": ids})
    Path("t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = planned(capsys, "--trace", "t.jsonl")
    # Turns of 20 to 100 blocks, each with all blocks of the turn before.
    assert found["hit_share"] == pytest.approx((20 + 40 + 60 + 80) / (20 + 40 + 60 + 80 + 100))
    small = planned(capsys, "--trace", "t.jsonl", "--rate", "4", "--dram-gb", "250", "--nvme-gb", "0", "--redis-gb", "0")
    assert small["hit_share"] < 0.9 * found["hit_share"]
    assert small["without_cache"]["prefill"]["workers"] > found["without_cache"]["prefill"]["workers"]
    first = planned(capsys, "--trace", "t.jsonl", "--requests", "40", code=1)
    assert first["hit_share"] == 0


def test_the_help_has_an_example_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    text = capsys.readouterr().out
    example = text[text.index("headstart plan --model") : text.index("exit codes")].replace("\\", " ").split()
    assert planned(capsys, *example[2:])["pays"]
