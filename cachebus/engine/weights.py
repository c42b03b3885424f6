"""Identity of a model's weights, computed in seconds for any size.

It covers what the files say of themselves and samples of what they hold: the configuration and the code that came with it, the
tokenizer's vocabulary, the shard index, every shard's name, size and safetensors header (all tensor names, types, shapes and
offsets), the hub's commit, pages at fixed relative places of every shard and the first page of its tensors. The folder's path
is not part of it, so two copies of one model are one model.

The vocabulary changes no KV, but one worker turns text into ids for all of them, so workers that disagree on it must not pass for
one model. What is rendered from a chat changes ids, and those are in every key; sampling defaults change neither.

What it can't see: a change that keeps every size and header and touches only bytes that are not sampled, such as one patched
value in the middle of a tensor. A retrained, quantised or fine-tuned model changes nearly every page of the tensors it changes, so
it is seen. Between two commits of a hub model even that is seen, by the commit.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3
from huggingface_hub import snapshot_download

from cachebus.errors import HeadstartError

PAGE_BYTES = 4096
PAGES_PER_SHARD = 64
TENSORS_PER_SHARD = 1024
_HEADER_BYTES_MAX = 100 << 20
_SAFETENSORS, _INDEX = ".safetensors", "model.safetensors.index.json"
_OTHER_SHARDS = (".bin", ".pt", ".pth", ".gguf")
_LEFT_OUT = {"generation_config.json", "tokenizer_config.json", "chat_template.json", "trainer_state.json"}
# Where a model was saved and by which release: it differs between copies of the same weights.
_PROVENANCE = {"_name_or_path", "transformers_version"}
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _Model:
    files: list[Path]
    revision: str


def weights_identity(model: str, revision: str = "", *, dummy: bool = False) -> str:
    """Hex BLAKE3 (64 digits) of a local folder's, a file's or a cached hub model's weights.

    ``model``: a path or a hub name whose files are in the local cache already. ``dummy``: vLLM makes the weights up, the same ones for the
    same configuration. Raises HeadstartError where there are no weights to be found, or where they are damaged or incomplete.
    """
    found = _find(model, revision)
    hasher = blake3()
    _add(hasher, b"revision", found.revision.encode())
    for path in found.files:
        if path.suffix == ".json" and path.name not in _LEFT_OUT:
            _add(hasher, b"json", path.name.encode(), _canonical(path.read_bytes()))
        elif path.suffix == ".py":
            _add(hasher, b"code", path.name.encode(), path.read_bytes())
    if dummy:
        _add(hasher, b"dummy")
        return hasher.hexdigest()
    for path in _shards(model, found.files):
        with path.open("rb") as file:
            _add_shard(hasher, path, file)
    return hasher.hexdigest()


def _find(model: str, revision: str) -> _Model:
    path = Path(model)
    if not path.exists():
        try:
            path = Path(snapshot_download(model, revision=revision or None, local_files_only=True))
        except (OSError, ValueError) as error:
            raise HeadstartError(f"model.name {model!r}: no such folder, and no cached download of that name: {error}") from error
    if path.is_file():
        return _Model([path], revision)
    files = sorted(file for file in path.iterdir() if file.is_file())
    # A name such as "main" moves; the hub's cache names a snapshot's folder after its commit.
    return _Model(files, path.name if _COMMIT.fullmatch(path.name) else revision)


def _shards(model: str, files: Sequence[Path]) -> list[Path]:
    """The files that vLLM loads: safetensors before others, and of those the ones that the index names."""
    by_name = {path.name: path for path in files}
    shards = [path for path in files if path.suffix == _SAFETENSORS] or [path for path in files if path.suffix in _OTHER_SHARDS]
    if _INDEX in by_name:
        try:
            named = sorted(set(json.loads(by_name[_INDEX].read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HeadstartError(f"{by_name[_INDEX]} is damaged: it names no shards") from error
        missing = [name for name in named if name not in by_name]
        if missing:
            raise HeadstartError(
                f"model.name {model!r} is incomplete: {missing[0]} is missing ({len(missing)} of {len(named)} shards): fetch it again"
            )
        shards = [by_name[name] for name in named]
    if not shards:
        raise HeadstartError(f"model.name {model!r}: no weights there (*{_SAFETENSORS}, *{', *'.join(_OTHER_SHARDS)})")
    return shards


def _canonical(content: bytes) -> bytes:
    """The same JSON in one form, without what tells copies apart; what does not parse counts as it is."""
    try:
        value = json.loads(content)
    except ValueError:
        return content
    if isinstance(value, dict):
        value = {key: entry for key, entry in value.items() if key not in _PROVENANCE}
    return json.dumps(value, sort_keys=True).encode()


def _add_shard(hasher: blake3, path: Path, file: BinaryIO) -> None:
    size = path.stat().st_size
    _add(hasher, b"shard", path.name.encode(), size.to_bytes(8, "little"))
    offsets = _spread(size)
    if path.suffix == _SAFETENSORS:
        header = _header(file.fileno(), path)
        _add(hasher, b"header", header)
        offsets += _tensor_offsets(header, path)
    for offset in sorted(set(offsets)):
        _add(hasher, b"page", os.pread(file.fileno(), PAGE_BYTES, offset))


def _header(descriptor: int, path: Path) -> bytes:
    (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0).ljust(8, b"\0"))
    if length > _HEADER_BYTES_MAX:
        raise HeadstartError(f"{path} is damaged: its safetensors header claims {length} bytes")
    return os.pread(descriptor, length, 8)


def _tensor_offsets(header: bytes, path: Path) -> list[int]:
    """Where each tensor begins in the file: of more than ``TENSORS_PER_SHARD`` an even choice."""
    try:
        starts = sorted(entry["data_offsets"][0] for name, entry in json.loads(header).items() if name != "__metadata__")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise HeadstartError(f"{path} is damaged: its safetensors header can't be read") from error
    step = max(1, -(-len(starts) // TENSORS_PER_SHARD))
    return [8 + len(header) + int(start) for start in starts[::step]]


def _spread(size: int) -> list[int]:
    """Page offsets spread evenly over a shard, its first and last page among them."""
    last = max(0, size - PAGE_BYTES)
    count = min(PAGES_PER_SHARD, size // PAGE_BYTES + 1)
    return [last * number // max(1, count - 1) for number in range(count)]


def _add(hasher: blake3, *fields: bytes) -> None:
    for field in fields:
        hasher.update(len(field).to_bytes(8, "little"))
        hasher.update(field)
