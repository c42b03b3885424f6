from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cachebus.errors import SettingsError
from deploy.plan.shape import NAMED, shape_of

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def written(folder: Path, **changed: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({key: value for key, value in {**LLAMA_8B, **changed}.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.2-1b", 1.236), ("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55), ("llama-3.1-405b", 405.85)]
)
def test_named_shapes_have_the_parameters_they_are_named_after(name: str, billions: float) -> None:
    assert NAMED[name].parameters / 1e9 == pytest.approx(billions, rel=0.003)


def test_bytes_follow_the_types() -> None:
    full, small = shape_of("Llama-3.1-70B", 2, 2), shape_of("llama-3.1-70b", 1, 1)
    assert (full.kv_bytes_per_token, small.kv_bytes_per_token) == (327_680, 163_840)
    assert full.weights == 2 * full.parameters
    assert full.weights - small.weights == full.linear_parameters


def test_a_config_is_read_as_the_named_shape(tmp_path: Path) -> None:
    named = shape_of("llama-3.1-8b", 2, 2)
    for place in (written(tmp_path), tmp_path / "config.json"):
        found = shape_of(str(place), 2, 2)
        assert found.name == tmp_path.name
        assert (found.parameters, found.kv_bytes_per_token, found.head) == (named.parameters, named.kv_bytes_per_token, 128)
    assert shape_of(str(written(tmp_path, head_dim=64)), 2, 2).head == 64
    assert shape_of(str(written(tmp_path, num_key_value_heads=None)), 2, 2).kv_heads == 32


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"num_hidden_layers": "many"}, "no shape"),
        ({"num_hidden_layers": 0}, "below 1"),
    ],
)
def test_what_is_no_dense_decoder_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        shape_of(str(written(tmp_path, **changed)), 2, 2)


def test_a_window_that_is_not_used_is_none(tmp_path: Path) -> None:
    assert shape_of(str(written(tmp_path, sliding_window=4096, use_sliding_window=False)), 2, 2).layers == 32


def test_an_unknown_name_names_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"llama-3\.1-8b, .*No such file"):
        shape_of("gpt-9", 2, 2)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SettingsError, match="truncated"):
        shape_of(str(tmp_path), 2, 2)
