"""``headstart cache warm`` against a router that runs; only the engines are doubles."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_double import EngineDouble
from router_under_test import RouterUnderTest
from tests_shared import Bus, wait_for

from deploy.cache.progress import Progress, eta
from deploy.cache.prompts import read_prompts
from deploy.cli import main

LONG = "x" * 1100


@pytest.fixture
def engines(bus: Bus) -> Iterator[tuple[EngineDouble, EngineDouble]]:
    made = (EngineDouble(bus, "p", "prefill"), EngineDouble(bus, "d", "decode"))
    yield made
    for engine in made:
        engine.stop()


@pytest.fixture
def router(bus: Bus, engines: tuple[EngineDouble, EngineDouble]) -> Iterator[RouterUnderTest]:
    router = RouterUnderTest(bus)
    router.knows(2)
    yield router
    router.stop()


def warm(router: RouterUnderTest, file: Path, *arguments: str) -> int:
    return main(["cache", "warm", str(file), "--url", f"http://127.0.0.1:{router.port}/v1", *arguments])


def lines(file: Path, *rows: Any) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_prompts_are_computed_once_and_known_the_second_time(
    router: RouterUnderTest, engines: tuple[EngineDouble, EngineDouble], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefill, decode = engines
    file = lines(
        tmp_path / "p.jsonl",
        {"prompt": LONG, "model": "m", "max_tokens": 900, "n": 3, "seed": 4},
        "",
        {"messages": [{"role": "user", "content": "y" * 1300}], "max_completion_tokens": 50},
        [ord("z")] * 700,
    )
    assert warm(router, file, "--concurrency", "1") == 0
    said = capsys.readouterr()
    shown = [row.split() for row in said.out.splitlines()]
    assert shown[0] == ["line", "tokens", "cached", "seconds", "route"]
    assert [(row[0], row[1], row[2], row[4]) for row in shown[1:4]] == [
        ("1", "1100", "0", "prefill+decode"),
        ("3", "1300", "0", "prefill+decode"),
        ("4", "700", "0", "prefill+decode"),
    ]
    assert said.out.splitlines()[-1].startswith("warmed 3 of 3 prompts, 0 failed: 3100 tokens, 0 of them cached before")
    assert "3 of 3 prompts, 0 tokens were cached" in said.err
    assert [body["max_tokens"] for body in decode.bodies] == [1, 1, 1]
    assert decode.bodies[0]["seed"] == 4
    assert not any({"n", "max_completion_tokens"} & set(body) for body in decode.bodies)
    assert len(prefill.bodies) == 3
    assert warm(router, file, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["warmed"], found["failed"], found["cached_tokens"]) == (3, 0, 1099 + 1299 + 699)
    assert {row["line"]: (row["prompt_tokens"], row["cached_tokens"], row["route"]) for row in found["prompts"]} == {
        1: (1100, 1099, "decode"),
        3: (1300, 1299, "decode"),
        4: (700, 699, "decode"),
    }
    assert len(prefill.bodies) == 3


def test_bad_lines_are_named_and_the_others_go_on(router: RouterUnderTest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = {"prompt": LONG, "cache_salt": "s"}
    file = lines(tmp_path / "p.jsonl", "{", {"prompt": "a", "messages": []}, refused, {"prompt": LONG, "model": "other"}, {"prompt": LONG}, "7")
    assert warm(router, file) == 1
    said = capsys.readouterr()
    assert [row.split()[:2] for row in said.out.splitlines()[1:-1]] == [["5", "1100"]]
    assert said.out.splitlines()[-1].startswith("warmed 1 of 6 prompts, 5 failed")
    assert "line 1: not JSON" in said.err
    assert 'line 2: give an object with either "messages" or "prompt"' in said.err
    assert "line 3:" in said.err
    assert "cache_salt" in said.err
    assert "answered 404" in said.err.split("line 4:")[1]
    assert "line 6: give an object" in said.err
    assert "line 5" not in said.err


def test_a_text_is_one_prompt(router: RouterUnderTest, engines: tuple[EngineDouble, EngineDouble], tmp_path: Path) -> None:
    file = tmp_path / "system.txt"
    text = "one\ntwo\n" * 200
    file.write_text(text)
    assert warm(router, file, "--model", "m") == 0
    assert (engines[1].bodies[-1]["prompt"], engines[1].bodies[-1]["model"]) == ([ord(c) for c in text], "m")
    assert warm(router, file, "--system") == 0
    assert engines[1].bodies[-1]["messages"] == [{"role": "system", "content": text}]


def test_what_a_file_may_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps({"prompt": "p\u2028q"}, indent=2, ensure_ascii=False))
    (prompt,) = read_prompts(whole, None, system=False)
    assert (prompt.path, prompt.body) == ("/v1/completions", {"prompt": "p\u2028q", "max_tokens": 1})
    for row in ({"prompt": "p\u2028q", "model": "its own"}, {"messages": []}):
        (prompt,) = read_prompts(lines(tmp_path / "one.jsonl", json.dumps(row, ensure_ascii=False)), "given", system=False)
        assert prompt.body == {"model": "given", **row, "max_tokens": 1}
    for empty in ("none.jsonl", "none.txt"):
        (tmp_path / empty).write_text("")
        assert main(["cache", "warm", str(tmp_path / empty)]) == 2
        assert "holds no prompt" in capsys.readouterr().err
    assert main(["cache", "warm", str(tmp_path / "missing")]) == 2
    assert "can't read" in capsys.readouterr().err


def test_a_router_that_is_not_there_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lines(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert main(["cache", "warm", str(file), "--set", "router.host=0.0.0.0", "--set", f"router.port={port}"]) == 2
    said = capsys.readouterr().err
    assert said.count(f"no router answers at http://127.0.0.1:{port}") == 1
    assert main(["cache", "warm", str(file), "--set", "router.port=0"]) == 2
    assert main(["cache", "warm", str(file), "--url", "localhost"]) == 2


@pytest.mark.parametrize("variable", [True, False])
def test_a_key_goes_with_every_request(
    router: RouterUnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    app = router._server.config.loaded_app
    original = app.app if hasattr(app, "app") else app

    async def spy(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(scope.get("headers", [])).get(b"authorization"))
        await original(scope, receive, send)

    monkeypatch.setattr(app, "app", spy)
    file = lines(tmp_path / "p.jsonl", {"prompt": "a"})
    if variable:
        monkeypatch.setenv("HEADSTART_API_KEY", "secret")
    assert warm(router, file, *(() if variable else ("--api-key", "secret"))) == 0
    assert [key for key in seen if key] == [b"Bearer secret"]
    assert "secret" not in "".join(capsys.readouterr())


def test_ctrl_c_ends_with_a_summary(router: RouterUnderTest, engines: tuple[EngineDouble, EngineDouble], tmp_path: Path) -> None:
    decode = engines[1]
    file = lines(tmp_path / "p.jsonl", *({"prompt": f"{n}"} for n in range(4)))
    decode.hold.clear()
    command = [sys.executable, "-m", "deploy", "cache", "warm", str(file), "--json", "--url", f"http://127.0.0.1:{router.port}"]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent.parent, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(decode.bodies) == 2, 30)
        os.kill(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    found = json.loads(out)
    assert (found["ended"], found["warmed"], found["not_asked"]) == (True, 0, 4)
    wait_for(lambda: decode.aborted == 2)


def test_progress_is_one_line_on_a_terminal_and_a_line_now_and_then_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), "\r\x1b[Kdone 1\n"), (io.StringIO(), "done 1\n")):
        progress = Progress(lambda seconds: "done 1", stream)
        progress.show()
        assert stream.getvalue() == "", "short work says nothing on its way"
        progress.show(last=True)
        assert stream.getvalue() == shown
    assert [eta(10, 1, 4), eta(10, 0, 4), eta(10, 4, 4), eta(3600, 1, 4)] == [", 0:30 left", "", "", ", 3:00:00 left"]
