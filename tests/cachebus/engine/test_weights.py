from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path

import pytest

from cachebus.engine.weights import weights_identity
from cachebus.errors import HeadstartError

HEADER = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()


def model(folder: Path, size: int = 300_000) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "generation_config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(HEADER)) + HEADER + bytes(size))
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


@pytest.mark.parametrize("offset", [0, 20, len(HEADER) + 8, -1], ids=["header length", "header", "first byte", "last byte"])
def test_a_changed_byte_of_header_or_sampled_page_is_seen(tmp_path: Path, offset: int) -> None:
    folder = model(tmp_path / "a")
    before = weights_identity(str(folder))
    shard = folder / "model.safetensors"
    flip(shard, offset % shard.stat().st_size)
    if offset:
        assert weights_identity(str(folder)) != before
    else:
        # The header's length itself: the header read with it differs.
        assert weights_identity(str(folder)) != before


def test_configuration_size_and_shards_count_sampling_defaults_do_not(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    seen = {weights_identity(str(folder))}
    (folder / "generation_config.json").write_text('{"temperature": 1}')
    assert weights_identity(str(folder)) in seen
    (folder / "config.json").write_text('{"hidden_size": 16}')
    seen.add(weights_identity(str(folder)))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    seen.add(weights_identity(str(folder)))
    with (folder / "other.safetensors").open("ab") as file:
        file.write(b"\0")
    seen.add(weights_identity(str(folder)))
    assert len(seen) == 4


def test_a_very_large_checkpoint_takes_seconds(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    for number in range(30):
        with (folder / f"shard-{number}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(HEADER)) + HEADER)
            file.truncate(5 << 30)
    started = time.monotonic()
    weights_identity(str(folder))
    assert time.monotonic() - started < 5


def test_no_weights_and_damaged_headers_are_named(tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match="nobody/nothing"):
        weights_identity("nobody/nothing")
    folder = model(tmp_path / "a")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(HeadstartError, match="damaged"):
        weights_identity(str(folder))
