"""``headstart bench plot``: a figure for each benchmark that the given files hold."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import msgspec
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cachebus.errors import HeadstartError
from deploy.bench.report import Row

_COLOURS = {"headstart": "#d1495b", "vllm": "#30638e", "vllm-offloading": "#edae49", "lmcache-server": "#5b8e7d"}
_OTHER_COLOURS = ("#8c8c8c", "#7a5195", "#5b8e7d", "#e07a5f", "#003f5c", "#b5c99a")
_STYLES = ("-", "--", ":", "-.")
_COLUMNS_MAX = 3
_TICKS_APART_MIN = 1.1
_LONG_LABELS = 60
_LINEAR_MAX = 12
_TTFT = "ttft_seconds"
_UNITS = {
    _TTFT: "time to first token, s",
    "itl_seconds": "from token to token, s",
    "requests_per_second": "requests/s",
    "hit_tokens_share": "share of prompt tokens cached",
    "added_share": "share added to the time to first token",
    "bound_share": "share of the bound 1 / (1 - reuse)",
    "put_bytes_per_second": "put, GB/s",
    "get_bytes_per_second": "get, GB/s",
}


class _Document(msgspec.Struct):
    rows: list[Row]


def run(options: argparse.Namespace) -> int:
    """Draws; prints the files it made. Raises HeadstartError where a file holds no rows."""
    mpl.use("agg")
    by_bench: dict[str, list[Row]] = {}
    for path in options.files:
        for row in read(path):
            by_bench.setdefault(row.bench, []).append(row)
    options.folder.mkdir(parents=True, exist_ok=True)
    for bench, rows in by_bench.items():
        figure = draw(bench, rows)
        path = options.folder / f"{bench}.{options.format}"
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
        print(path)
    return 0


def read(path: Path) -> list[Row]:
    """A document's rows. Raises HeadstartError where it is none."""
    try:
        rows = msgspec.json.decode(path.read_bytes(), type=_Document).rows
    except OSError as error:
        raise HeadstartError(f"{path} can't be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise HeadstartError(f"{path} is no result of a benchmark: {error}") from error
    if not rows:
        raise HeadstartError(f"{path} holds no rows")
    return rows


def draw(bench: str, rows: Sequence[Row]) -> Figure:
    """One benchmark's figure: lines over the prompts' length, or bars by what was compared."""
    panels = _by_length(rows) if bench in ("prefix", "hits", "chat", "handover") else _by_case(rows)
    columns = min(_COLUMNS_MAX, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(6.2 * columns, 4.4 * lines), squeeze=False, layout="constrained")
    for axis, (title, paint) in zip(axes.flat, panels, strict=False):
        paint(axis)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    models = ", ".join(dict.fromkeys(row.model for row in rows if row.model))
    figure.suptitle(f"headstart bench {bench}" + (f": {Path(models).name}" if models else ""), fontsize=12)
    return figure


class _Bar(NamedTuple):
    """Where a row stands: in which panel, at which group along its axis, under which name in the legend; and how high."""

    panel: str
    group: str
    name: str
    median: float
    p99: float


def _bar(row: Row) -> _Bar:
    """A bar's place by its benchmark: what is to be compared stands side by side."""
    unit, scale = _UNITS.get(row.metric, row.metric.replace("_", " ")), 1.0
    panel, group, name = unit, row.case, row.system
    if row.bench == "reuse":
        source, _, share = row.case.rpartition(", ")
        panel = f"{unit}, {share} reuse" if source else f"{unit}, no reuse"
        group, name = f"{row.concurrency} clients", f"{row.system}, {source or row.case}"
    elif row.bench == "tiers":
        tier, _, size = row.case.rpartition(", ")
        panel, group, name, scale = f"{tier}, {unit}", size, f"{row.system}, {row.concurrency} at a time", 1e-9
    elif row.bench == "trace":
        kind, _, which = row.metric.rpartition("_")
        panel = {"hit_ceiling": _UNITS["hit_tokens_share"], "hit_share_of": "hits as a share of the ceiling"}.get(kind, unit)
        group = {"hit_ceiling": f"ceiling, {which}", "hit_share_of": which}.get(kind, "measured")
    return _Bar(panel, group, name, row.median * scale, row.p99 * scale)


_Panel = tuple[str, Callable[[Axes], None]]


def _by_case(rows: Sequence[Row]) -> list[_Panel]:
    metrics = list(dict.fromkeys(row.metric for row in rows))
    bars = [_bar(row) for row in sorted(rows, key=lambda row: metrics.index(row.metric))]
    return [(panel, _bars([bar for bar in bars if bar.panel == panel])) for panel in dict.fromkeys(bar.panel for bar in bars)]


def _bars(bars: Sequence[_Bar]) -> Callable[[Axes], None]:
    """Groups along the axis, in each a bar for each name."""

    def paint(axis: Axes) -> None:
        groups, names = list(dict.fromkeys(bar.group for bar in bars)), list(dict.fromkeys(bar.name for bar in bars))
        width = 0.8 / len(names)
        for place, name in enumerate(names):
            mine = [bar for bar in bars if bar.name == name]
            left = [groups.index(bar.group) - 0.4 + width * (place + 0.5) for bar in mine]
            heights = [bar.median for bar in mine]
            hatch = "///" if "held" in name or "unchecked" in name else ""
            drawn = axis.bar(left, heights, width * 0.92, color=_colour(name, names), label=name, hatch=hatch, edgecolor="white")
            axis.bar_label(drawn, [f"{height:.3g}" for height in heights], fontsize=7, padding=2)
            above = [max(0.0, bar.p99 - bar.median) for bar in mine]
            if any(above):
                reach = [[0.0] * len(mine), above]
                axis.errorbar(left, heights, yerr=reach, fmt="none", ecolor="#444444", capsize=2, linewidth=0.8)
        turned = sum(map(len, groups)) > _LONG_LABELS
        axis.set_xticks(range(len(groups)), groups, fontsize=8, rotation=20 if turned else 0, ha="right" if turned else "center")
        axis.set_ylabel("median; whisker to p99", fontsize=8)
        axis.margins(y=0.1 + 0.07 * len(names))
        axis.legend(fontsize=7, loc="upper left", ncols=2)

    return paint


def _by_length(rows: Sequence[Row]) -> list[_Panel]:
    """A panel for each metric and number of requests at a time."""
    titles = {(row.metric, row.concurrency): f"{_UNITS.get(row.metric, row.metric)}, {row.concurrency} at a time" for row in rows}
    return [(title, _lines([row for row in rows if (row.metric, row.concurrency) == key])) for key, title in titles.items()]


def _lines(rows: Sequence[Row]) -> Callable[[Axes], None]:
    def paint(axis: Axes) -> None:
        cases, systems = list(dict.fromkeys(row.case for row in rows)), list(dict.fromkeys(row.system for row in rows))
        for system, case in dict.fromkeys((row.system, row.case) for row in rows):
            points = sorted((row.tokens, row.median, row.p99) for row in rows if (row.system, row.case) == (system, case))
            lengths, medians, worst = zip(*points, strict=True)
            style, colour = _STYLES[cases.index(case) % len(_STYLES)], _colour(system, systems)
            axis.plot(lengths, medians, style, color=colour, marker="o", markersize=4, label=f"{system}, {case}")
            axis.fill_between(lengths, medians, worst, color=colour, alpha=0.12, linewidth=0)
        ticks: list[int] = []
        for length in sorted({row.tokens for row in rows}):
            # Labels of lengths that are nearly the same would cover each other.
            if not ticks or length >= ticks[-1] * _TICKS_APART_MIN:
                ticks.append(length)
        if ticks[-1] > ticks[0] * _LINEAR_MAX:
            axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{length:,}" for length in ticks], rotation=45, fontsize=8)
        axis.minorticks_off()
        if rows[0].metric == _TTFT:
            axis.set_yscale("log")
        axis.set_xlabel("prompt, tokens")
        axis.set_ylabel("median; shade to p99", fontsize=8)
        axis.legend(fontsize=8)

    return paint


def _colour(name: str, names: Sequence[str]) -> str:
    """A system's own colour, or one by its place among the names."""
    return _COLOURS.get(name.partition(",")[0]) or _OTHER_COLOURS[names.index(name) % len(_OTHER_COLOURS)]
