"""``headstart bench prefix``: time to first token over HTTP by prompt length, cold and hit, against plain vLLM and LMCache."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from cachebus.engine.command import served_name
from cachebus.errors import HeadstartError, SettingsError
from deploy.bench import report, systems
from deploy.bench.systems import Case
from deploy.prompts import Prompts
from deploy.settings import Settings

_SEED = 7
_WARM_UP_TOKENS = (700, 2048)
_METRIC = "ttft_seconds"

System = Callable[[Settings, Path, Callable[[str], None]], AbstractContextManager[list[Case]]]


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Measures; 0 where every system gave the same tokens for the same prompts."""
    lengths = _lengths(options.lengths)
    wanted = _systems(options)
    rows: list[report.Row] = []
    tokens: dict[tuple[int, int], dict[str, list[int]]] = defaultdict(dict)
    with tempfile.TemporaryDirectory(prefix="headstart-bench-") as folder:
        for name, system in wanted.items():
            _say(f"starting {name}")
            with system(settings, Path(folder), lambda text: None) as cases:
                rows += _measure(settings, name, cases, lengths, options.runs, tokens)
    result = report.document(rows, ["headstart", "bench", "prefix", *sys.argv[3:]])
    if options.output:
        report.write(options.output, result)
    print(json.dumps(result) if options.json else report.table(rows, "TTFT, s"))
    different = [place for place, answers in tokens.items() if len({tuple(ids) for ids in answers.values()}) > 1]
    for length, number in different:
        _say(f"FAILED: prompt {number} of {length} tokens: the systems' answers differ: {tokens[length, number]}")
    return 1 if different else 0


def _measure(
    settings: Settings, system: str, cases: list[Case], lengths: list[int], runs: int, tokens: dict[tuple[int, int], dict[str, list[int]]]
) -> list[report.Row]:
    prompts = Prompts(settings.model, _SEED)
    for length in _WARM_UP_TOKENS:
        prompt = prompts.text(length)
        for case in cases:
            prompt = prompts.text(length) if case.fresh else prompt
            case.ask(prompt)
    rows = []
    for length in lengths:
        seconds: dict[str, list[float]] = {case.name: [] for case in cases}
        for number in range(runs):
            # The first prompt of a run is the same for every system, so that their answers can be compared.
            prompts = Prompts(settings.model, hash((length, number)))
            prompt = ""
            for place, case in enumerate(cases):
                if case.fresh:
                    prompt = prompts.text(length)
                answer = case.ask(prompt)
                if answer.usage["prompt_tokens"] != length:
                    _say(f"a prompt of {length} tokens was counted as {answer.usage['prompt_tokens']}")
                seconds[case.name].append(answer.ttft_seconds)
                if place < 2:
                    tokens[length, number][f"{system}, {case.name}"] = answer.token_ids
        for name, values in seconds.items():
            median, p99 = report.figure(values)
            _say(f"{system}, {length} tokens, {name}: {median:.3f} s")
            model, kv_dtype = served_name(settings.model), settings.model.kv_cache_dtype
            rows.append(report.Row("prefix", system, model, kv_dtype, name, length, 1, _METRIC, median, p99, len(values)))
    return rows


def _systems(options: argparse.Namespace) -> dict[str, System]:
    python = str(options.lmcache_python or sys.executable)
    known: dict[str, tuple[str, System]] = {
        "vllm": ("vllm", systems.plain_vllm),
        "headstart": ("headstart", systems.headstart),
        "lmcache": ("lmcache-server", functools.partial(systems.lmcache, python=python)),
    }
    wanted: dict[str, System] = {}
    for name in options.systems.split(","):
        if name not in known:
            raise SettingsError(f"--systems: {name!r} is unknown; there are: {', '.join(known)}")
        if name == "lmcache" and not _has_lmcache(python):
            _say(f"{python} has no LMCache: left out; name one that has with --lmcache-python")
            continue
        label, system = known[name]
        wanted[label] = system
    return wanted


def _has_lmcache(python: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec("lmcache") is not None
    try:
        return subprocess.run([python, "-c", "import lmcache"], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise HeadstartError(f"--lmcache-python: can't run {python}: {error.strerror}") from error


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise SettingsError(f"--lengths {text}: give numbers of tokens, such as 512,2048") from error
    if min(lengths) < 1:
        raise SettingsError(f"--lengths {text}: a prompt has at least one token")
    return lengths


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr)
