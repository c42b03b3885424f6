from __future__ import annotations

import msgspec
import pytest

from cachebus.errors import SettingsError
from cachebus.settings import CacheSettings, ModelSettings, WorkerSettings, load_settings


class Sections(msgspec.Struct):
    model: ModelSettings
    cache: CacheSettings
    decode: WorkerSettings


def load(text: str, **environ: str) -> Sections:
    return load_settings(Sections, text, "headstart.yaml", environ)


def refusal(text: str, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as error:
        load(text, **environ)
    return str(error.value).splitlines()


def test_no_file_gives_the_defaults() -> None:
    assert load("").cache == CacheSettings()


def test_a_file_and_the_environment_over_it() -> None:
    settings = load("cache:\n  chunk_size: 512\n  max_local_cpu_size: 2\ndecode:\n  engine_args: ['--x', '1']\n", HEADSTART_CACHE_CHUNK_SIZE="1024")
    assert (settings.cache.chunk_size, settings.cache.max_local_cpu_size) == (1024, 2.0)
    assert settings.decode.engine_args == ["--x", "1"]


def test_every_problem_is_named_with_its_line_and_a_way_out() -> None:
    problems = refusal("cach:\n  chunk_size: 1\ncache:\n  chunksize: 256\n  chunk_size: 100\n  lookup_ms_max: soon\nmodel: fast\n")
    assert problems == [
        "headstart.yaml:7: model: a section holds keys, such as `chunk_size: 256`",
        "headstart.yaml:1: cach: no such section; did you mean cache?",
        "headstart.yaml:4: cache.chunksize: no such key; did you mean chunk_size?",
        "headstart.yaml:6: cache.lookup_ms_max: expected `int`, got `str`",
        "headstart.yaml:5: cache.chunk_size: 100 is no multiple of 16; 256 suits most models, 512 contexts over 128K",
    ]


def test_an_unknown_variable_of_a_known_section_is_refused() -> None:
    assert refusal("", HEADSTART_CACHE_CHUNKSIZE="1") == ["HEADSTART_CACHE_CHUNKSIZE: cache.chunksize: no such key; did you mean chunk_size?"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cache: [1", "not YAML"),
        ("- cache", "must hold sections"),
        ("cache:\n  max_local_cpu_size: 0", "gives no room"),
        ("cache:\n  local_cpu: false", "leave it true"),
        ("cache:\n  run_dir: /" + "x" * 120, "too long"),
        ("decode:\n  port: 70000\n  count: 1", "no port"),
        ("decode:\n  port: 8001\n  count: 2", "can't share port"),
        ("decode:\n  gpu_memory_utilization: 1.5", "no share"),
        ("model:\n  max_model_len: -1", "negative"),
    ],
)
def test_impossible_values_are_refused(text: str, said: str) -> None:
    assert said in "\n".join(refusal(text))


def test_places_follow_the_run_directory() -> None:
    one, other = CacheSettings(run_dir="/a"), CacheSettings(run_dir="/b")
    assert one.resolved_region_path({}) != other.resolved_region_path({})
    assert str(CacheSettings().resolved_run_dir({"XDG_RUNTIME_DIR": "/run/user/5"})) == "/run/user/5/headstart"
