from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cachebus.errors import SettingsError
from deploy.sim.profile import Profile, at, read_profile


def test_a_curve_is_straight_between_its_points_and_flat_beyond() -> None:
    curve = ((1.0, 10.0), (5.0, 20.0), (10.0, 0.5))
    assert [at(curve, x) for x in (0, 1, 3, 5, 7.5, 10, 99)] == [10, 10, 15, 20, 10.25, 0.5, 0.5]


def test_the_default_takes_about_as_long_as_the_engine_it_is_fitted_to() -> None:
    """Cold prompts of ``benchmarks/h200/hits.json``, seconds."""
    profile = Profile()
    for tokens, measured in ((2048, 0.051), (8192, 0.217), (32768, 1.205), (131072, 10.437)):
        steps = [(start, min(profile.max_num_batched_tokens, tokens - start)) for start in range(0, tokens, profile.max_num_batched_tokens)]
        assert sum(profile.step_seconds([step], []) for step in steps) == pytest.approx(measured, rel=0.1)
    assert profile.pull_seconds(131072) == pytest.approx(0.431 - 0.05, rel=0.1)


def test_who_shares_a_step_waits_for_the_others() -> None:
    profile = Profile()
    alone, beside = profile.step_seconds([], [1000] * 8), profile.step_seconds([(0, 8192)], [1000] * 8)
    assert 0.005 < alone < 0.012
    assert beside == pytest.approx(alone + profile.step_seconds([(0, 8192)], []) - profile.step_ms / 1e3)
    assert profile.step_seconds([], [100_000] * 8) > 2 * alone


def test_profiles_are_read_and_mistakes_in_them_are_named(tmp_path: Path) -> None:
    assert read_profile(None) == Profile()
    (tmp_path / "a.toml").write_text('model = "m"\ndecode_ms = [[1, 5.0], [8, 9.0]]\n')
    assert read_profile(tmp_path / "a.toml") == Profile(model="m", decode_ms=((1, 5.0), (8, 9.0)))
    (tmp_path / "a.json").write_text('{"blocks": 9000}')
    assert read_profile(tmp_path / "a.json").blocks == 9000
    for text, named in (
        ("block = 3", "block"),
        ("blocks = 3", "max_model_len"),
        ("decode_ms = [[8, 5.0], [1, 9.0]]", "decode_ms"),
        ("pull_gb_per_second = 0", "pull_gb_per_second"),
        ("layers = 0", "layers"),
        ("layers = ", "a.toml"),
    ):
        (tmp_path / "a.toml").write_text(text)
        with pytest.raises(SettingsError, match=named):
            read_profile(tmp_path / "a.toml")
    with pytest.raises(SettingsError, match="can't be read"):
        read_profile(tmp_path / "none.toml")


def test_neither_torch_nor_vllm_is_needed() -> None:
    code = "import sys, deploy.sim.run; print({'vllm', 'torch'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout == "set()\n"
