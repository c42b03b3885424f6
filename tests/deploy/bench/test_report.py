"""Figures, the table and the document that a benchmark leaves."""

from __future__ import annotations

import json
from pathlib import Path

from deploy.bench import report
from deploy.bench.report import Row


def row(system: str, case: str, tokens: int, median: float) -> Row:
    return Row("prefix", system, "some-model", "auto", case, tokens, 1, "ttft_seconds", median, median, 3)


def test_median_and_99th_percentile() -> None:
    assert report.figure([3.0, 1.0, 2.0]) == (2.0, 3.0)
    assert report.figure([1.0, 2.0, 3.0, 10.0]) == (2.5, 10.0)
    assert report.figure([0.5]) == (0.5, 0.5)
    assert report.figure([float(n) for n in range(1000)]) == (499.5, 990.0)


def test_table_has_a_line_a_case_and_a_column_a_length() -> None:
    rows = [row("vllm", "cold", 8192, 5.1), row("vllm", "cold", 512, 0.1649), row("headstart", "dram", 512, 0.05)]
    assert report.table(rows, "TTFT, s").splitlines() == [
        "| TTFT, s | 512 | 8,192 |",
        "|---|---|---|",
        "| vllm, cold | 0.165 | 5.100 |",
        "| headstart, dram | 0.050 | - |",
    ]


def test_document_says_what_was_measured_where(tmp_path: Path) -> None:
    result = report.document([row("vllm", "cold", 512, 0.1)], ["headstart", "bench", "prefix"], {"cooling": "fan"})
    assert result["command"] == "headstart bench prefix"
    assert result["commit"]
    assert result["host"]["cores"] >= 1
    assert result["host"]["cooling"] == "fan"
    expected = {"bench": "prefix", "system": "vllm", "model": "some-model", "kv_dtype": "auto", "case": "cold", "tokens": 512}
    expected |= {"concurrency": 1, "metric": "ttft_seconds", "median": 0.1, "p99": 0.1, "runs": 3}
    assert result["rows"] == [expected]
    report.write(tmp_path / "new" / "file.json", result)
    assert json.loads((tmp_path / "new" / "file.json").read_text()) == result
