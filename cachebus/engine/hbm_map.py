"""Which chunks an engine's prefix cache holds, from vLLM's KV cache events. A plain state machine.

vLLM tells of blocks, by a hash of its own that names a block's tokens and all before them. Here they are a tree: a block hangs
under the one before it, and a chunk is in HBM when all of its blocks are, and every block before them. That is exactly what a prompt
can hit, since vLLM looks from a prompt's first block on and ends at the first that it lacks. Blocks come and go in any order.

vLLM may hold one hash in several blocks (two requests that computed the same tokens at once) and tells of each by itself, so
copies are counted. What depends on more than token ids and a salt (an adapter, images, prompt embeddings) has no key here.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cachebus.errors import BusError
from cachebus.keys import chunk_key, root_key

BLOCKS_MAX = 1 << 21
"""More than any engine has; an engine that names more is not believed."""

_GPU = "GPU"
_WORD_BYTES = 4

BlockHash = bytes | int
"""vLLM's own name of a block: a digest, or its low 64 bits where VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES is set."""


class KvEvent(msgspec.Struct):
    """One of vLLM's events: BlockStored, BlockRemoved or AllBlocksCleared by ``type``. What is not named here is passed over."""

    type: str
    block_hashes: list[BlockHash] = []
    parent_block_hash: BlockHash | None = None
    token_ids: list[int] = []
    block_size: int = 0
    lora_id: int | None = None
    lora_name: str | None = None
    medium: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None


class _Batch(msgspec.Struct, array_like=True):
    time: float
    events: list[KvEvent]


_batches = msgspec.msgpack.Decoder(_Batch)


def decode_batch(payload: bytes) -> list[KvEvent]:
    """The events of one engine step, in order. Raises BusError where the payload is none of vLLM's."""
    try:
        return _batches.decode(payload).events
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BusError(f"a batch of KV events that does not decode: {error}") from error


@dataclass(slots=True)
class _Block:
    """``depth``: blocks from the prompt's start to this one's end, 0 while one of them is missing. ``key``: of the chunk that it ends, once known."""

    parent: BlockHash | None
    tokens: bytes
    salt: str
    copies: int = 1
    depth: int = 0
    key: bytes = b""
    children: set[BlockHash] = field(default_factory=set)


class HbmMap:
    """The chunks in HBM of one engine. Sizes in tokens. Raises ValueError where a chunk is no whole number of blocks."""

    def __init__(self, namespace: bytes, block_size: int, chunk_size: int) -> None:
        if chunk_size % block_size:
            raise ValueError(f"a chunk of {chunk_size} tokens is no whole number of blocks of {block_size}")
        self._namespace, self._block_size = namespace, block_size
        self._blocks_in_chunk = chunk_size // block_size
        self._blocks: dict[BlockHash, _Block] = {}
        # Blocks that came before the one they follow, by that one's hash.
        self._orphans: dict[BlockHash, set[BlockHash]] = {}
        self.chunks: set[bytes] = set()
        """Keys of the chunks that are in HBM."""
        self._fresh: set[bytes] = set()
        self._gone: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._blocks)

    def apply(self, event: KvEvent) -> None:
        """Takes one event in. Raises BusError where an event can't be true: what is known is then not to be trusted."""
        if event.type == "AllBlocksCleared":
            self.clear()
        elif event.medium not in (None, _GPU) or event.group_idx not in (None, 0):
            return
        elif event.type == "BlockRemoved":
            for name in event.block_hashes:
                self._remove(name)
        elif event.type == "BlockStored" and event.block_size == self._block_size and event.lora_id is None and event.lora_name is None:
            self._store_run(event)

    def clear(self) -> None:
        """Nothing is known to be in HBM any more."""
        for key in self.chunks:
            self._note(key, self._gone, self._fresh)
        self.chunks.clear()
        self._blocks.clear()
        self._orphans.clear()

    def changes(self) -> tuple[list[bytes], list[bytes]]:
        """The chunks that came and those that went since the last call; what came and went again is in neither."""
        fresh, gone = list(self._fresh), list(self._gone)
        self._fresh.clear()
        self._gone.clear()
        return fresh, gone

    def forget_told(self) -> None:
        """The next ``changes`` names all chunks, as if there had been none before."""
        self._fresh, self._gone = set(self.chunks), set()

    def _store_run(self, event: KvEvent) -> None:
        if len(event.token_ids) != len(event.block_hashes) * self._block_size:
            raise BusError(f"{len(event.block_hashes)} blocks of {self._block_size} tokens with {len(event.token_ids)} token ids")
        if len(self._blocks) + len(event.block_hashes) > BLOCKS_MAX:
            raise BusError(f"more than {BLOCKS_MAX} blocks in one engine")
        try:
            tokens = array("I", event.token_ids).tobytes()
        except OverflowError as error:
            raise BusError(f"a token id that is none: {error}") from error
        extras = event.extra_keys or [None] * len(event.block_hashes)
        parent, size = event.parent_block_hash, self._block_size * _WORD_BYTES
        for number, (name, extra) in enumerate(zip(event.block_hashes, extras, strict=False)):
            salt = _salt(extra, first=parent is None)
            if salt is None:
                # What follows it can't be reached without it.
                return
            self._store(name, _Block(parent, tokens[number * size : (number + 1) * size], salt))
            parent = name

    def _store(self, name: BlockHash, block: _Block) -> None:
        known = self._blocks.get(name)
        if known is not None:
            known.copies += 1
            return
        self._blocks[name] = block
        block.children = self._orphans.pop(name, block.children)
        if block.parent is None:
            self._reach(name)
            return
        parent = self._blocks.get(block.parent)
        if parent is None:
            self._orphans.setdefault(block.parent, set()).add(name)
            return
        parent.children.add(name)
        if parent.depth:
            self._reach(name)

    def _remove(self, name: BlockHash) -> None:
        block = self._blocks.get(name)
        if block is None:
            return
        block.copies -= 1
        if block.copies:
            return
        self._lose(name)
        del self._blocks[name]
        if block.children:
            self._orphans[name] = block.children
        if block.parent is None:
            return
        parent = self._blocks.get(block.parent)
        siblings = self._orphans.get(block.parent, set()) if parent is None else parent.children
        siblings.discard(name)
        if parent is None and not siblings:
            self._orphans.pop(block.parent, None)

    def _reach(self, name: BlockHash) -> None:
        """All that comes before the block is there: so are the chunks that it and what hangs under it complete."""
        waiting = [name]
        while waiting:
            name = waiting.pop()
            block = self._blocks[name]
            block.depth = self._blocks[block.parent].depth + 1 if block.parent is not None else 1
            if block.depth % self._blocks_in_chunk == 0:
                block.key = block.key or self._derive(name)
                self.chunks.add(block.key)
                self._note(block.key, self._fresh, self._gone)
            waiting.extend(block.children)

    def _lose(self, name: BlockHash) -> None:
        """Nothing from the block on can be hit any more."""
        waiting = [name]
        while waiting:
            block = self._blocks[waiting.pop()]
            if not block.depth:
                continue
            if block.depth % self._blocks_in_chunk == 0:
                self.chunks.discard(block.key)
                self._note(block.key, self._gone, self._fresh)
            block.depth = 0
            waiting.extend(block.children)

    def _derive(self, last: BlockHash) -> bytes:
        """The key of the chunk that ends with block ``last``, all blocks before it being there."""
        tokens: list[bytes] = []
        block = self._blocks[last]
        tokens.append(block.tokens)
        for _ in range(self._blocks_in_chunk - 1):
            assert block.parent is not None
            block = self._blocks[block.parent]
            tokens.append(block.tokens)
        base = root_key(self._namespace, block.salt) if block.parent is None else self._blocks[block.parent].key
        return chunk_key(base, b"".join(reversed(tokens)))

    @staticmethod
    def _note(key: bytes, happened: set[bytes], opposite: set[bytes]) -> None:
        if key in opposite:
            opposite.discard(key)
        else:
            happened.add(key)


def _salt(extra: Any, *, first: bool) -> str | None:
    """The salt that a block's extra keys hold ("" for none); None where they hold something else.

    Only a prompt's first block carries the salt, as a bare string; images are pairs, prompt embeddings are bytes.
    """
    if not extra:
        return ""
    if first and len(extra) == 1 and isinstance(extra[0], str):
        return str(extra[0])
    return None
