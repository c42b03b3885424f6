"""Identity of a model's weights, computed in seconds for any size.

It covers what the files say of themselves and samples of what they hold: the configuration, the tokenizer's vocabulary, the shard index,
every shard's name, size and safetensors header (all tensor names, types, shapes and offsets), and pages at fixed
relative places of every shard. The folder's path is not part of it, so two copies of one model are one model.

What it can't see: a change that keeps every size and header and touches only bytes between the sampled pages, such as
one patched value. A retrained, quantised or fine-tuned model changes nearly every page, so it is seen.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3
from huggingface_hub import snapshot_download

from cachebus.errors import HeadstartError

PAGE_BYTES = 4096
PAGES_PER_SHARD = 64
_HEADER_BYTES_MAX = 100 << 20
_SHARDS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# What is rendered from a chat changes token ids, and those are in the keys; sampling defaults change no KV.
_LEFT_OUT = {"generation_config.json", "tokenizer_config.json", "chat_template.json"}


def weights_identity(model: str, revision: str = "") -> str:
    """Hex BLAKE3 (64 digits) of a local folder's, a file's or a cached hub model's weights.

    ``model``: a path or a hub name whose files are in the local cache already. Raises HeadstartError where there are no
    weights to be found.
    """
    folder = _resolve(model, revision)
    files = [folder] if folder.is_file() else sorted(path for path in folder.iterdir() if path.is_file())
    shards = [path for path in files if path.suffix in _SHARDS]
    hasher = blake3()
    for path in files:
        if path.suffix == ".json" and path.name not in _LEFT_OUT:
            _add(hasher, b"json", path.name.encode(), path.read_bytes())
    for path in shards:
        size = path.stat().st_size
        _add(hasher, b"shard", path.name.encode(), size.to_bytes(8, "little"))
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                _add(hasher, b"header", _header(file.fileno(), path))
            for offset in _sampled_offsets(size):
                _add(hasher, b"page", os.pread(file.fileno(), PAGE_BYTES, offset))
    return hasher.hexdigest()


def _resolve(model: str, revision: str) -> Path:
    path = Path(model)
    if path.exists():
        return path
    try:
        return Path(snapshot_download(model, revision=revision or None, local_files_only=True))
    except Exception as error:
        raise HeadstartError(f"model.name {model!r}: no such folder, and no cached download of that name: {error}") from error


def _header(descriptor: int, path: Path) -> bytes:
    (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0).ljust(8, b"\0"))
    if length > _HEADER_BYTES_MAX:
        raise HeadstartError(f"{path} is damaged: its safetensors header claims {length} bytes")
    return os.pread(descriptor, length, 8)


def _sampled_offsets(size: int) -> Iterator[int]:
    """Page offsets spread evenly over a shard, its first and last page among them."""
    last = max(0, size - PAGE_BYTES)
    count = min(PAGES_PER_SHARD, size // PAGE_BYTES + 1)
    seen = -1
    for number in range(count):
        offset = last * number // max(1, count - 1)
        if offset != seen:
            yield offset
        seen = offset


def _add(hasher: blake3, *fields: bytes) -> None:
    for field in fields:
        hasher.update(len(field).to_bytes(8, "little"))
        hasher.update(field)
