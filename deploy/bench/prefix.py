"""``headstart bench prefix``: time to first token over HTTP by prompt length, cold and hit, against plain vLLM and LMCache."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from cachebus.engine.command import served_name
from cachebus.errors import HeadstartError, SettingsError
from deploy.bench import goals, quiet, report, systems
from deploy.bench.systems import Case
from deploy.bench.texts import Count, counter, exact_text
from deploy.settings import Settings

RESERVED_CORES = "VLLM_CPU_NUM_OF_RESERVED_CPU"
"""On CPU vLLM keeps one core free of computing, with a KV connector one more; on few cores plain vLLM and the others would then
compute on different numbers of cores. So the number is fixed, for all alike."""
_RESERVED_CORES_DEFAULT = "0"
_ROUNDS = 2
_WARM_UP_TOKENS = (700, 2048)
_METRIC = "ttft_seconds"

System = Callable[[Settings, Path, Callable[[str], None]], AbstractContextManager[list[Case]]]


@dataclass
class Gathered:
    """All that was measured: seconds by (system, case, prompt length), and by prompt the tokens of each answer."""

    seconds: dict[tuple[str, str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    answers: dict[str, dict[str, list[int]]] = field(default_factory=lambda: defaultdict(dict))
    runs: int = 0
    disturbed: int = 0


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Measures; 0 where every system gave the same tokens for the same prompts. Raises HeadstartError where a system does not work."""
    lengths, wanted = _lengths(options.lengths), _systems(options)
    if options.runs < 1:
        raise SettingsError(f"--runs {options.runs}: measure at least once")
    os.environ.setdefault(RESERVED_CORES, _RESERVED_CORES_DEFAULT)
    gathered, count = Gathered(), counter(settings.model)
    with tempfile.TemporaryDirectory(prefix="headstart-bench-") as folder:
        for turn, numbers in enumerate(rounds(options.runs)):
            # The second round goes backwards, so that a machine that gets slower or faster treats all systems alike.
            for name in list(wanted)[:: -1 if turn % 2 else 1]:
                _say(f"round {turn + 1}: starting {name}")
                with wanted[name](settings, Path(folder), functools.partial(_progress, name)) as cases:
                    _measure(gathered, name, cases, lengths, numbers, count)
    rows = _rows(gathered, settings)
    command = ["headstart", "bench", "prefix", *sys.argv[sys.argv.index("prefix") + 1 :]]
    result = report.document(rows, command, {RESERVED_CORES: os.environ[RESERVED_CORES]})
    if options.output:
        report.write(options.output, result)
    print(json.dumps(result) if options.json else report.table(rows, "TTFT, s"))
    for outcome in goals.outcomes(rows):
        verdict = "" if outcome.reached else f", MISSED: at most {outcome.ratio_max}"
        _say(f"{outcome.goal}, {outcome.tokens} tokens: {outcome.ratio:.2f}{verdict}")
    if gathered.disturbed:
        _say(f"{gathered.disturbed} of {gathered.runs} runs were disturbed by other processes on this machine")
    return 1 if _report_differences(gathered) else 0


def rounds(runs: int) -> list[range]:
    """The numbers of the runs, shared out to the rounds in which every system is started anew."""
    half = -(-runs // _ROUNDS)
    return [numbers for first in range(0, runs, half) if (numbers := range(first, min(runs, first + half)))]


def differing(answers: dict[str, dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """The answers to those prompts that did not give the same tokens everywhere."""
    return [given for given in answers.values() if len({tuple(ids) for ids in given.values()}) > 1]


def _measure(gathered: Gathered, system: str, cases: list[Case], lengths: Sequence[int], numbers: range, count: Count) -> None:
    for length in _WARM_UP_TOKENS:
        _ask_all(cases, length, f"warm-up/{system}/{numbers.start}/{length}", count)
    for length in lengths:
        for number in numbers:
            timed = [case for case in cases if case.timed or number == 0]
            _run(gathered, system, timed, length, number, count)
        for case in cases:
            values = gathered.seconds.get((system, case.name, length))
            if values:
                _say(f"{system}, {length} tokens, {case.name}: {report.figure(values)[0]:.3f} s (median of {len(values)})")


def _run(gathered: Gathered, system: str, cases: list[Case], length: int, number: int, count: Count) -> None:
    """Asks every case once; again, with other prompts, where other processes kept the machine busy. The quietest try counts."""

    def ask(tried: int) -> dict[str, float]:
        # The first try's prompts are the same for every system, so that their answers can be compared.
        asked = _ask_all(cases, length, f"{length}/{number}/{tried}", count)
        for case, prompt, _, token_ids in asked:
            gathered.answers[prompt][f"{system}, {case.name}"] = token_ids
        return {case.name: seconds for case, _, seconds, _ in asked if case.timed}

    seconds, disturbed = quiet.quietest(ask)
    gathered.runs += 1
    gathered.disturbed += disturbed
    for name, value in seconds.items():
        gathered.seconds[system, name, length].append(value)


def _ask_all(cases: list[Case], length: int, seed: str, count: Count) -> list[tuple[Case, str, float, list[int]]]:
    """Each case with its prompt, time to first token in seconds, and tokens. Raises HeadstartError where the engine counts otherwise."""
    asked, prompt, fresh = [], "", 0
    for case in cases:
        if case.fresh:
            prompt, fresh = exact_text(length, count, f"{seed}/{fresh}"), fresh + 1
        answer = case.ask(prompt)
        if answer.usage["prompt_tokens"] != length:
            raise HeadstartError(f"a prompt of {length} tokens was counted as {answer.usage['prompt_tokens']} by the engine")
        asked.append((case, prompt, answer.ttft_seconds, answer.token_ids))
    return asked


def _rows(gathered: Gathered, settings: Settings) -> list[report.Row]:
    rows = []
    model, kv_dtype = served_name(settings.model), settings.model.kv_cache_dtype
    for (system, case, length), values in gathered.seconds.items():
        median, p99 = report.figure(values)
        rows.append(report.Row("prefix", system, model, kv_dtype, case, length, 1, _METRIC, median, p99, len(values)))
    return rows


def _report_differences(gathered: Gathered) -> bool:
    compared = sum(len(given) > 1 for given in gathered.answers.values())
    different = differing(gathered.answers)
    _say(f"answers compared for {compared} prompts: {len(different)} differ")
    for given in different:
        _say(f"FAILED: {given}")
    return bool(different)


def _systems(options: argparse.Namespace) -> dict[str, System]:
    python = str(options.lmcache_python or sys.executable)
    known: dict[str, tuple[str, System]] = {
        "vllm": (goals.PLAIN, systems.plain_vllm),
        "headstart": (goals.OURS, systems.headstart),
        "lmcache": (goals.LMCACHE, functools.partial(systems.lmcache, python=python)),
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
        return subprocess.run([python, "-c", "import lmcache, vllm"], capture_output=True, check=False).returncode == 0
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


def _progress(system: str, text: str) -> None:
    _say(f"{system}: {text}")


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
