from __future__ import annotations

import msgspec
import pytest

from cachebus.errors import SettingsError
from cachebus.settings import CacheSettings, ModelSettings, WorkerSettings
from cachebus.settings_file import load_settings


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


def test_a_key_given_twice_is_refused() -> None:
    assert refusal("cache:\n  chunk_size: 256\n  chunk_size: 512\nmodel:\ncache:\n") == [
        "headstart.yaml:3: cache.chunk_size: given in line 2 already; keep one of them",
        "headstart.yaml:5: cache: given in line 1 already; keep one of them",
    ]


@pytest.mark.parametrize("value", ["!!python/object/apply:os.getcwd []", "!mine x", "2020-99-99", "&a [*a]", "{[]: 1}"])
def test_what_is_no_plain_value_is_refused_with_its_line(value: str) -> None:
    (problem,) = refusal(f"cache:\n  run_dir: {value}\n")
    assert problem.startswith("headstart.yaml:2: cache.run_dir: ")


@pytest.mark.parametrize("text", ["a\x01: b", "cache:\n\tchunk_size: 5", "a: b: c", "%X", "'", "---\na: 1\n---\nb: 2"])
def test_what_is_not_yaml_is_refused_with_a_line(text: str) -> None:
    (problem,) = refusal(text)
    assert problem.split(":")[1].isdigit()


def test_variables_are_text_where_text_is_wanted() -> None:
    settings = load("", HEADSTART_MODEL_REVISION="007", HEADSTART_MODEL_NAME="", HEADSTART_CACHE_LOCAL_CPU="true")
    assert (settings.model.revision, settings.model.name, settings.cache.local_cpu) == ("007", "", True)
    (problem,) = refusal("model:\n  revision: 007\n")
    assert problem.endswith("expected `str`, got `int`; put it in quotes")


def test_text_is_no_number() -> None:
    assert refusal("decode:\n  count: '2'\n") == ["headstart.yaml:2: decode.count: expected `int`, got `str`"]
    assert refusal("", HEADSTART_DECODE_COUNT="two") == ["HEADSTART_DECODE_COUNT: decode.count: expected `int`, got `str`"]


def test_a_slip_in_a_section_of_a_variable_is_refused_and_strangers_are_not() -> None:
    assert refusal("", HEADSTART_CAHCE_CHUNK_SIZE="1") == ["HEADSTART_CAHCE_CHUNK_SIZE: cahce: no such section; did you mean cache?"]
    assert load("", HEADSTART_HOME="/opt").cache == CacheSettings()


@pytest.mark.parametrize("value", [".nan", ".inf", "-1", "1.0e+999"])
def test_a_size_is_a_finite_number(value: str) -> None:
    assert "gives no room" in refusal(f"cache:\n  max_local_cpu_size: {value}\n")[0]


def test_a_default_run_directory_too_long_for_sockets_is_refused_when_used() -> None:
    with pytest.raises(SettingsError, match=r"cache\.run_dir: .* too long"):
        CacheSettings().resolved_run_dir({"XDG_RUNTIME_DIR": "/" + "x" * 100})
    longest = "/" + "x" * (107 - len("//events.sock"))
    assert CacheSettings(run_dir=longest).problems() == []
    assert CacheSettings(run_dir=longest + "x").problems() != []
