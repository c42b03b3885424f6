"""A simulated engine's KV cache events, as vLLM 0.32 publishes them: which blocks came into its prefix cache and which went. Pure."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Any

import msgspec

_RANK = 0


class KvEvents:
    """What has happened since the last batch; blocks that follow each other in one prompt are told as one."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._events: list[dict[str, Any]] = []

    def stored(self, name: bytes, before: bytes | None, tokens: Sequence[int], salt: str) -> None:
        """A block became full; ``before`` names the one that it follows, None at a prompt's beginning."""
        last = self._events[-1] if self._events else {}
        if before is not None and last.get("type") == "BlockStored" and last["block_hashes"][-1] == before:
            last["block_hashes"].append(name)
            last["token_ids"] += tokens
            last["extra_keys"].append(None)
            return
        event = {"type": "BlockStored", "block_hashes": [name], "parent_block_hash": before, "token_ids": list(tokens)}
        extra = [salt] if salt and before is None else None
        same = {"block_size": self._block_size, "lora_id": None, "lora_name": None, "medium": "GPU", "group_idx": 0}
        self._events.append(event | same | {"extra_keys": [extra]})

    def removed(self, name: bytes) -> None:
        """A block was taken for something else."""
        self._events.append({"type": "BlockRemoved", "block_hashes": [name], "medium": "GPU", "group_idx": 0})

    def batch(self, now_seconds: float) -> bytes | None:
        """Packs what happened and begins anew; None where nothing did."""
        if not self._events:
            return None
        events, self._events = self._events, []
        return msgspec.msgpack.encode([now_seconds, events, _RANK])


class LocalStream:
    """Batches on their way from an engine to the supervisor in the same process: none is lost, so none is asked for again."""

    def __init__(self) -> None:
        self._batches: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self._number = 0

    def put(self, batch: bytes) -> None:
        """The engine's next batch."""
        self._batches.put((self._number, batch))
        self._number += 1

    def receive(self, wait_ms: int) -> tuple[int, bytes] | None:
        """Number and payload of the next batch; None where none comes in time."""
        try:
            return self._batches.get(timeout=wait_ms / 1000) if wait_ms else self._batches.get_nowait()
        except queue.Empty:
            return None

    def replayed(self, first: int, wait_ms: int) -> list[tuple[int, bytes]]:
        """What was before the first ``receive`` is still to come."""
        return []

    def close(self) -> None:
        """Nobody listens any longer."""
