"""What adapters a worker may serve, and that their digest is that of what an engine reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachebus.engine.adapters import RUNTIME_UPDATES, check_unchanged, read_adapters
from cachebus.engine.command import adapter_arguments
from cachebus.errors import HeadstartError, UnsupportedModel
from cachebus.settings import ModelSettings

NEW = (0, 32, 0)


def adapter(folder: Path, weights: bytes = b"w", rank: object = 9) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return str(folder)


def model(*folders: str, **fields: int) -> ModelSettings:
    return ModelSettings(name="m", adapters=[f"a{number}={folder}" for number, folder in enumerate(folders)], **fields)  # type: ignore[arg-type]


def test_any_change_of_config_or_weights_is_another_digest(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / "0"), adapter(tmp_path / "1", b"v"), adapter(tmp_path / "2", rank=8), adapter(tmp_path / "3")]
    (tmp_path / "3" / "optimizer.pt").write_bytes(b"not read by an engine")
    found = read_adapters(model(*folders), NEW, {})
    assert len({one.digest for one in found}) == 3
    assert found[0].digest == found[3].digest
    assert adapter_arguments(found[:2]) == [
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "16", "--lora-modules"),
        *(f"a0={folders[0]}", f"a1={folders[1]}"),
    ]
    assert adapter_arguments([]) == []


def test_an_adapter_that_changes_while_it_is_loaded_is_found_out(tmp_path: Path) -> None:
    found = read_adapters(model(adapter(tmp_path / "0")), NEW, {})
    check_unchanged(found)
    adapter(tmp_path / "0", b"v")
    with pytest.raises(HeadstartError, match="a0 changed while it was loaded"):
        check_unchanged(found)


def test_what_is_not_proven_is_refused_by_name(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "0")
    with pytest.raises(UnsupportedModel, match=r"from vLLM 0\.32 on"):
        read_adapters(model(folder), (0, 25, 1), {})
    with pytest.raises(UnsupportedModel, match="tensor parallelism"):
        read_adapters(model(folder, tensor_parallel_size=2), NEW, {})
    with pytest.raises(UnsupportedModel, match=f"unset {RUNTIME_UPDATES}"):
        read_adapters(model(folder), NEW, {RUNTIME_UPDATES: "True"})
    with pytest.raises(UnsupportedModel, match="rank 513"):
        read_adapters(model(adapter(tmp_path / "1", rank=513)), NEW, {})
    assert read_adapters(model(), (0, 25, 1), {RUNTIME_UPDATES: "1"}) == []


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files_are_said(tmp_path: Path, missing: str) -> None:
    folder = adapter(tmp_path / "0")
    (tmp_path / "0" / missing).unlink()
    with pytest.raises(HeadstartError, match=missing):
        read_adapters(model(folder), NEW, {})


@pytest.mark.parametrize("given", [["a"], ["=b"], ["a="], ["a=b", "a=c"], ["m=b"]])
def test_settings_that_name_no_adapter_are_refused(given: list[str]) -> None:
    assert [key for key, _ in ModelSettings(name="m", adapters=given).problems()] == ["adapters"]
