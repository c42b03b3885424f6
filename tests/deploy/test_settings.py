from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cachebus.errors import SettingsError
from deploy.settings import DEFAULT_FILE, as_help, as_yaml, read_settings


def test_the_file_of_the_working_directory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_settings(None, [], {}).router.port == 8000
    DEFAULT_FILE.write_text("router:\n  port: 8001\n")
    assert read_settings(None, [], {}).router.port == 8001


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "headstart.yaml"
    file.write_text("cache: {chunk_size: 128, lookup_ms_max: 1, pull_tokens_min: 1}\n")
    environ = {"HEADSTART_CACHE_CHUNK_SIZE": "512", "HEADSTART_CACHE_LOOKUP_MS_MAX": "2"}
    cache = read_settings(file, ["cache.chunk_size=1024"], environ).cache
    assert (cache.chunk_size, cache.lookup_ms_max, cache.pull_tokens_min) == (1024, 2, 1)


@pytest.mark.parametrize("written", ["chunk_size=5", "cache.chunk_size", "=5", ".x=5", "cache.=5"])
def test_an_override_of_another_shape_is_refused(written: str) -> None:
    with pytest.raises(SettingsError, match=r"section\.key=value"):
        read_settings(None, [written], {})


def test_an_override_of_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match="cach: no such section; did you mean cache"):
        read_settings(None, ["cach.chunk_size=512"], {})
    with pytest.raises(SettingsError, match="did you mean chunk_size"):
        read_settings(None, ["cache.chunksize=512"], {})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, said in (("missing", "No such file"), ("", "directory"), ("binary", "not UTF-8")):
        with pytest.raises(SettingsError, match=said):
            read_settings(tmp_path / name, [], {})


@pytest.mark.parametrize("written", [as_yaml, as_help])
def test_what_is_written_is_read_again(tmp_path: Path, written: object) -> None:
    assert callable(written)
    overrides = ["model.name=a: b", "model.served_name=007", "decode.engine_args=['--x', '# y']", "cache.max_local_cpu_size=2.5"]
    settings = read_settings(None, overrides, {})
    file = tmp_path / "headstart.yaml"
    file.write_text(written(settings))
    assert read_settings(file, [], {}) == settings


def test_every_key_is_explained() -> None:
    settings = read_settings(None, [], {})
    lines = as_help(settings).splitlines()
    keys = [number for number, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")]
    assert len(keys) == sum(1 + len(section) for section in yaml.safe_load(as_yaml(settings)).values())
    assert all(lines[number - 1].lstrip().startswith("# ") for number in keys)
