"""Figures of what benchmarks wrote."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cachebus.errors import HeadstartError
from deploy.bench import plot, report
from deploy.bench.report import Row
from deploy.cli import main

LENGTHS = (2048, 8192)


def row(bench: str, system: str, case: str, tokens: int = 2048, concurrency: int = 1, metric: str = "ttft_seconds") -> Row:
    return Row(bench, system, "some/model", "auto", case, tokens, concurrency, metric, tokens / 1e4, tokens / 1e4, 3)


CHAT = [
    row("chat", system, case, tokens, count) for system, case in (("vllm", "cold"), ("headstart", "dram")) for tokens in LENGTHS for count in (1, 8)
]
REUSE = [
    row("reuse", system, case, 1064, clients, metric)
    for system, case in (("vllm", "hbm, 80%"), ("vllm", "hbm held to a budget, 80%"), ("headstart", "dram, 95%"))
    for clients in (10, 50)
    for metric in ("requests_per_second", "hit_tokens_share")
]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_figure_a_benchmark(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.write(tmp_path / "one.json", report.document(CHAT, ["headstart"], {}))
    report.write(tmp_path / "two.json", report.document(REUSE, ["headstart"], {}))
    given = [str(tmp_path / "one.json"), str(tmp_path / "two.json"), "--folder", str(tmp_path / "new"), "--format", kind]
    assert main(["bench", "plot", *given]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "new" / f"{bench}.{kind}") for bench in ("chat", "reuse")]
    begin = {"png": b"\x89PNG", "svg": b"<?xml"}[kind]
    assert all((tmp_path / "new" / f"{bench}.{kind}").read_bytes().startswith(begin) for bench in ("chat", "reuse"))


def test_lines_over_the_length_hold_the_medians() -> None:
    figure = plot.draw("chat", CHAT)
    assert [axis.get_title() for axis in figure.axes] == ["time to first token, s, 1 at a time", "time to first token, s, 8 at a time"]
    for axis in figure.axes:
        assert [line.get_label() for line in axis.lines] == ["vllm, cold", "headstart, dram"]
        assert all(list(line.get_xdata()) == list(LENGTHS) and list(line.get_ydata()) == [0.2048, 0.8192] for line in axis.lines)


def test_bars_stand_by_clients_one_panel_a_share() -> None:
    figure = plot.draw("reuse", REUSE)
    assert [axis.get_title() for axis in figure.axes] == [
        "requests/s, 80% reuse",
        "requests/s, 95% reuse",
        "share of prompt tokens cached, 80% reuse",
        "share of prompt tokens cached, 95% reuse",
    ]
    first = figure.axes[0]
    assert [text.get_text() for text in first.get_xticklabels()] == ["10 clients", "50 clients"]
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["vllm, hbm", "vllm, hbm held to a budget"]
    assert len(first.patches) == 4


@pytest.mark.parametrize(
    ("content", "message"), [("{}", "no result of a benchmark"), ("[", "no result of a benchmark"), ('{"rows": []}', "holds no rows")]
)
def test_a_file_without_rows_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(HeadstartError, match=message):
        plot.read(tmp_path / "other.json")
    with pytest.raises(HeadstartError, match="can't be read"):
        plot.read(tmp_path / "none.json")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "plot", "some.json"]) == 2
    assert "headstart[bench]" in capsys.readouterr().err
