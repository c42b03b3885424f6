from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path

import pytest

from cachebus.engine.weights import PAGE_BYTES, PAGES_PER_SHARD, weights_identity
from cachebus.errors import HeadstartError

SHARD_BYTES = 3_000_000
SECOND_TENSOR = 1_000_003
HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "U8", "shape": [SECOND_TENSOR], "data_offsets": [0, SECOND_TENSOR]},
        "b": {"dtype": "U8", "shape": [SHARD_BYTES - SECOND_TENSOR], "data_offsets": [SECOND_TENSOR, SHARD_BYTES]},
    }
).encode()
DATA = len(HEADER) + 8


def shard(path: Path, size: int = SHARD_BYTES) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(HEADER)) + HEADER)
        file.truncate(DATA + size)


def model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8, "_name_or_path": "/somewhere"}')
    (folder / "generation_config.json").write_text("{}")
    shard(folder / "model.safetensors")
    return folder


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_the_place_does_not_matter(tmp_path: Path) -> None:
    first = model(tmp_path / "a")
    shutil.copytree(first, tmp_path / "b")
    assert weights_identity(str(first)) == weights_identity(str(tmp_path / "b"))


@pytest.mark.parametrize(
    "offset",
    [8 + HEADER.index(b"pt"), DATA, DATA + SECOND_TENSOR, (DATA + SHARD_BYTES - PAGE_BYTES) * 20 // (PAGES_PER_SHARD - 1), DATA + SHARD_BYTES - 1],
    ids=["header", "first byte", "a tensor's first byte", "a page in between", "last byte"],
)
def test_a_changed_byte_of_header_or_sampled_page_is_seen(tmp_path: Path, offset: int) -> None:
    folder = model(tmp_path / "a")
    before = weights_identity(str(folder))
    flip(folder / "model.safetensors", offset)
    assert weights_identity(str(folder)) != before


def test_a_changed_byte_between_the_samples_is_not_seen_as_the_module_says(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    before = weights_identity(str(folder))
    flip(folder / "model.safetensors", (DATA + SHARD_BYTES - PAGE_BYTES) // (PAGES_PER_SHARD - 1) + 2 * PAGE_BYTES)
    assert weights_identity(str(folder)) == before


def test_configuration_code_size_and_names_of_shards_count(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    seen = [weights_identity(str(folder))]
    (folder / "config.json").write_text('{"hidden_size": 16}')
    seen.append(weights_identity(str(folder)))
    (folder / "modeling.py").write_text("scale = 2")
    seen.append(weights_identity(str(folder)))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    seen.append(weights_identity(str(folder)))
    with (folder / "other.safetensors").open("ab") as file:
        file.write(b"\0")
    seen.append(weights_identity(str(folder)))
    seen.append(weights_identity(str(folder), "v2"))
    assert len(set(seen)) == len(seen)


def test_what_changes_no_value_does_not_count(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    before = weights_identity(str(folder))
    (folder / "generation_config.json").write_text('{"temperature": 1}')
    (folder / "config.json").write_text('{"_name_or_path": "/elsewhere",\n "transformers_version": "5", "hidden_size": 8}')
    # vLLM does not load these where there are safetensors.
    (folder / "pytorch_model.bin").write_bytes(b"the same weights again")
    assert weights_identity(str(folder)) == before


def test_other_formats_go_by_size_and_pages(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(100_000))
    before = weights_identity(str(tmp_path))
    flip(tmp_path / "pytorch_model.bin", 99_999)
    assert weights_identity(str(tmp_path)) != before


def test_the_index_says_which_shards_count(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shard(folder / "model-1.safetensors")
    with pytest.raises(HeadstartError, match=r"model-2\.safetensors is missing \(1 of 2 shards\)"):
        weights_identity(str(folder))
    shard(folder / "model-2.safetensors")
    before = weights_identity(str(folder))
    (folder / "model.safetensors").unlink()
    assert weights_identity(str(folder)) == before


def test_a_hub_name_is_found_in_the_cache_and_its_commit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some--model"
    commits = ["a" * 40, "b" * 40]
    (cached / "refs").mkdir(parents=True)
    (cached / "snapshots").mkdir()
    for commit in commits:
        model(cached / "snapshots" / commit)
    found = set()
    for commit in commits:
        (cached / "refs" / "main").write_text(commit)
        found.add(weights_identity("some/model"))
    found.add(weights_identity("some/model", "main"))
    found.add(weights_identity(str(cached / "snapshots" / commits[0])))
    assert len(found) == 2


def test_a_very_large_checkpoint_takes_seconds(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    for number in range(30):
        shard(folder / f"shard-{number}.safetensors", 5 << 30)
    started = time.monotonic()
    weights_identity(str(folder))
    assert time.monotonic() - started < 5


def test_no_weights_and_damaged_headers_are_named(tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match="nobody/nothing"):
        weights_identity("nobody/nothing")
    with pytest.raises(HeadstartError, match="no weights there"):
        weights_identity(str(tmp_path))
    folder = model(tmp_path / "a")
    for content in (b"\xff" * 100, struct.pack("<Q", 4) + b"none", struct.pack("<Q", 4) + b"[{}]"):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(HeadstartError, match="damaged"):
            weights_identity(str(folder))
