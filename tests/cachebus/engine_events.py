"""vLLM's KV cache events as they lie on the wire, written here a second time: the fields of 0.25.1, and those that 0.32.0 adds."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Version = Literal["0.25.1", "0.32.0"]
_LATER: dict[str, Any] = {"locality": "LOCAL", "ownership": None, "session_id": "a session"}


def stored(
    names: list[Any], parent: Any, tokens: list[int], block_size: int, extras: list[Any] | None = None, version: Version = "0.32.0", **more: Any
) -> dict[str, Any]:
    """Blocks that became full one after another."""
    event = {
        "type": "BlockStored",
        "block_hashes": names,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": block_size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": extras,
        "group_idx": 0,
    }
    return event | (_LATER if version == "0.32.0" else {}) | more


def removed(names: list[Any], **more: Any) -> dict[str, Any]:
    """Blocks that were evicted."""
    return {"type": "BlockRemoved", "block_hashes": names, "medium": "GPU", "group_idx": 0} | more


CLEARED = {"type": "AllBlocksCleared"}


def packed(*events: dict[str, Any]) -> bytes:
    """One step's batch: time, events, rank."""
    return msgspec.msgpack.encode([1.5, list(events), 0])
