"""The house numbers and bans, so that no review has to look for them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cachebus", "decode", "deploy", "prefill", "router")
FILE_LINES_MAX, FUNCTION_LINES_MAX, PARAMETERS_MAX = 400, 70, 8
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base_classes"}
BANNED_WORDS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")

IMPORTED_ONLY_BY = {
    # The limit that a benchmark measures itself must owe nothing to the bus's own sockets.
    "zmq": ("cachebus/zeromq", "deploy/bench/zeromq_stream.py"),
    "redis": ("cachebus/redis",),
    "vllm": ("cachebus/engine/", "deploy/bench/offline_process.py", "deploy/bench/streaming_process.py"),
    "torch": ("cachebus/engine/",),
    "starlette": ("router/",),
    "uvicorn": ("router/",),
    "opentelemetry": ("router/tracing.py",),
    "aiohttp": ("router/", "deploy/sim/", "deploy/bench/replay.py", "deploy/bench/router.py", "deploy/bench/soak"),
    "transformers": ("deploy/", "cachebus/engine/segment_tokenizer.py"),
    "tokenizers": ("deploy/", "cachebus/engine/segment_tokenizer.py"),
    "pickle": (),
    "marshal": (),
    "shelve": (),
}
"""Who may import what, by the beginning of the path; engines and transports stay exchangeable that way."""
PRINTS = (
    "deploy/cache/",
    "deploy/cli.py",
    "deploy/keys.py",
    "deploy/status.py",
    "deploy/launcher.py",
    "deploy/doctor/",
    "deploy/demo/",
    "deploy/bench/",
    "deploy/plan/",
)
IMPORTS_IN_FUNCTIONS = ("deploy/cli.py", "router/serve.py", "cachebus/engine/namespace.py", "cachebus/engine/blocks.py")
"""Composition roots, what only an engine has, and what only an extra brings."""
SWALLOWS_EVERYTHING: tuple[str, ...] = ()
"""Files that may catch everything without raising again: a supervisor's last resort."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def imported(tree: ast.AST) -> Iterator[str]:
    """The top-level packages that a file imports anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else str(node.module).partition(".")[0]


@pytest.mark.parametrize("path", sources(*PACKAGES, "tests"), ids=name_of)
def test_sizes_and_words(path: Path) -> None:
    text = path.read_text()
    found = [f"{path.stem}: a name that says nothing"] if path.stem in BANNED_NAMES else []
    if len(text.splitlines()) > FILE_LINES_MAX:
        found.append(f"{len(text.splitlines())} lines; split the file by what it does")
    if path != Path(__file__):
        found += [f"line {n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if BANNED_WORDS.search(line)]
    for function in functions(ast.parse(text)):
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if lines > FUNCTION_LINES_MAX:
            found.append(f"{function.name}: {lines} lines; give its steps names")
        arguments = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        if len(arguments) - (arguments[:1] in (["self"], ["cls"])) > PARAMETERS_MAX:
            found.append(f"{function.name}: {len(arguments)} parameters; make a dataclass of those that go together")
    assert not found


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_imports_stay_where_they_belong(path: Path) -> None:
    tree, name = ast.parse(path.read_text()), name_of(path)
    modules = set(imported(tree))
    wrong = [module for module, places in IMPORTED_ONLY_BY.items() if module in modules and not name.startswith(places)]
    assert not wrong
    assert "." not in modules, "imports are absolute"
    if not name.startswith(IMPORTS_IN_FUNCTIONS):
        inside = [f.name for f in functions(tree) if any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(f))]
        assert not inside, "imports stand at the top of a file"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_nothing_is_swallowed_or_printed(path: Path) -> None:
    tree, name = ast.parse(path.read_text()), name_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")):
            raises_again = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert raises_again or name.startswith(SWALLOWS_EVERYTHING), f"line {node.lineno}: name what can go wrong"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            assert name.startswith(PRINTS), f"line {node.lineno}: roles log, only commands print"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_what_is_public_is_explained(path: Path) -> None:
    tree = ast.parse(path.read_text())
    bare = [] if ast.get_docstring(tree) else ["the file"]
    public = [node for node in tree.body if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_")]
    bare += [node.name for node in public if not ast.get_docstring(node)]
    assert not bare
