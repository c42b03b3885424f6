"""LoRA adapters of a worker: which there are, and what their weights are, so that no KV of one is ever taken for another's or the base model's.

An adapter's KV is named by the base model's namespace and a digest of the adapter's files (``cachebus.keys.root_key``), never by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from cachebus.errors import HeadstartError, UnsupportedModel
from cachebus.settings import ModelSettings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FILES = (CONFIG, WEIGHTS, "new_embeddings.safetensors")
"""What an engine reads of an adapter."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Of vLLM's --max-lora-rank those for adapters of today."""
RUNTIME_UPDATES = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
_SINCE = (0, 32)


@dataclass(frozen=True)
class Adapter:
    """One adapter, by the name that clients use. ``rank`` is the smallest of ``RANKS`` that has room for it."""

    name: str
    folder: str
    digest: str
    rank: int


def read_adapters(model: ModelSettings, version: tuple[int, ...], environ: Mapping[str, str]) -> list[Adapter]:
    """The adapters that the settings name; their files are read whole. Raises UnsupportedModel by name for what is not proven, HeadstartError
    where files are missing."""
    named = model.named_adapters()
    if not named:
        return []
    if version[:2] < _SINCE:
        raise UnsupportedModel(f"model.adapters: LoRA is proven from vLLM {'.'.join(map(str, _SINCE))} on, and this is {'.'.join(map(str, version))}")
    if model.tensor_parallel_size > 1:
        raise UnsupportedModel("model.adapters: LoRA with tensor parallelism is not proven yet: set model.tensor_parallel_size to 1")
    if environ.get(RUNTIME_UPDATES, "").lower() in ("1", "true"):
        raise UnsupportedModel(f"model.adapters: unset {RUNTIME_UPDATES}: one that is changed while it is served would keep its old KV")
    return [_read(name, Path(folder)) for name, folder in named.items()]


def check_unchanged(adapters: Sequence[Adapter]) -> None:
    """Raises HeadstartError where an adapter's files are others by now than when they were read: nobody knows which of them were loaded."""
    for adapter in adapters:
        if _digest(Path(adapter.folder)) != adapter.digest:
            raise HeadstartError(f"model.adapters: the files of {adapter.name} changed while it was loaded: start the worker again")


def _read(name: str, folder: Path) -> Adapter:
    try:
        rank = json.loads((folder / CONFIG).read_text())["r"]
        if not (folder / WEIGHTS).is_file():
            raise HeadstartError(f"model.adapters: {name} has no {WEIGHTS} in {folder}; other forms of weights are not supported")
        digest = _digest(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HeadstartError(f"model.adapters: {name}: can't read {CONFIG} in {folder}: {error}") from error
    room = next((most for most in RANKS if isinstance(rank, int) and rank <= most), None)
    if room is None:
        raise UnsupportedModel(f"model.adapters: {name} has rank {rank}, and at most {RANKS[-1]} is supported")
    return Adapter(name, str(folder), digest, room)


def _digest(folder: Path) -> str:
    hasher = blake3()
    for name in _FILES:
        path = folder / name
        if path.is_file():
            hasher.update(f"{name} {path.stat().st_size}\n".encode())
            hasher.update_mmap(path)
    return hasher.hexdigest()
