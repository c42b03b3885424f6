from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from deploy import cli


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No headstart.yaml and no variables of the developer's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.environ", {"PATH": "/usr/bin", "HOME": str(tmp_path)})
    yield


def help_of(*command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys=capsys)
    for command in ("up", "demo", "status", "bench", "config", "cachebus", "prefill", "decode", "router", "sim", "plan"):
        assert f" {command} " in text
    assert "exit codes: 0" in text


@pytest.mark.parametrize("command", [("up",), ("demo",), ("prefill",), ("decode",), ("bench", "prefix")])
def test_commands_that_serve_a_model_take_one(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(*command, capsys=capsys)
    assert "--model NAME_OR_PATH" in text
    assert "--set SECTION.KEY=VALUE" in text


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"headstart {metadata.version('headstart')}\n"


def test_help_loads_no_engine_and_no_server() -> None:
    code = "import sys, deploy.cli; print({'vllm', 'torch', 'zmq', 'starlette', 'aiohttp', 'numpy'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout == "set()\n"


def test_config_prints_what_is_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--set", "cache.chunk_size=512"]) == 0
    printed = capsys.readouterr().out
    assert "  chunk_size: 512\n" in printed
    Path("headstart.yaml").write_text(printed)
    assert cli.main(["config"]) == 0
    assert capsys.readouterr().out == printed


def test_wrong_settings_end_with_code_2_and_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    Path("headstart.yaml").write_text("cache:\n  chunk: 1\nrouter:\n  port: -1\n")
    assert cli.main(["up"]) == cli.EXIT_ERROR
    said = capsys.readouterr().err
    assert said.startswith("headstart: error: headstart.yaml:2: cache.chunk: no such key; did you mean chunk_size?\n")
    assert "headstart.yaml:4: router.port: -1 is no port" in said


def test_a_bus_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--set", f"cache.run_dir={tmp_path / 'none'}"]) == cli.EXIT_ERROR
    said = capsys.readouterr().err
    assert str(tmp_path / "none") in said
    assert "headstart cachebus" in said


def test_an_error_of_ours_is_one_line_without_a_traceback() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "deploy", "config", "--set", "cache.chunk_size=5"], check=False, capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == cli.EXIT_ERROR
    assert len(shown.stderr.splitlines()) == 1
