"""The engine's KV cache as bytes: where each block of each layer lies, and the copies between blocks and extents.

A block's bytes are opaque: what lies where in them is the engine's affair (on a CPU it even depends on the instruction
set). An extent holds its blocks layer by layer: ``[layer][block][page bytes]``, each page as the engine keeps it.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from blake3 import blake3

from cachebus.engine.process_memory import Pages, ProcessMemory
from cachebus.errors import HandoverError, UnsupportedModel
from cachebus.messages_handover import SharedMemory

if TYPE_CHECKING:
    import torch

LOAD_THREADS_MAX = 4
"""Threads that share one pull on a processor; two reach twice the speed of one, and more than four would take memory bandwidth from the engine."""


@dataclass(frozen=True)
class LayerMemory:
    """One layer's blocks: block ``b`` is ``page_bytes`` at ``address + b * stride_bytes``."""

    address: int
    stride_bytes: int
    page_bytes: int
    tensor: torch.Tensor


def layer_memory(name: str, tensor: torch.Tensor, num_blocks: int) -> LayerMemory:
    """Where a layer's blocks lie. Raises UnsupportedModel where a block is not one dense run of bytes, blocks first."""
    if tensor.shape[0] % num_blocks:
        raise UnsupportedModel(f"the KV cache of {name} has shape {tuple(tensor.shape)}: its first dimension is not the {num_blocks} blocks")
    # A kernel's blocks may be smaller than the scheduler's: then several rows make one block.
    rows = tensor.shape[0] // num_blocks
    dense = 1
    for size, stride in sorted(zip(tensor.shape[1:], tensor.stride()[1:], strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride != dense:
            raise UnsupportedModel(f"a block of {name} is not contiguous: shape {tuple(tensor.shape)}, strides {tensor.stride()}")
        dense *= size
    if rows > 1 and tensor.stride(0) != dense:
        raise UnsupportedModel(f"a block of {name} is in {rows} pieces: strides {tensor.stride()}")
    item = tensor.element_size()
    return LayerMemory(tensor.data_ptr(), rows * tensor.stride(0) * item, rows * dense * item, tensor)


@dataclass(frozen=True)
class Entry:
    """A chunk's or a tail's blocks in the engine, and its bytes in the region. -1 among ``blocks`` leaves one out."""

    blocks: Sequence[int]
    extent: memoryview


@dataclass(frozen=True)
class Handed:
    """A chunk's or a tail's blocks here, and where they lie in another engine's memory."""

    blocks: Sequence[int]
    there: Sequence[int]


class Blocks(Protocol):
    """Copies between an engine's blocks and extents of the region.

    Each copy returns, for each entry, the keyed BLAKE3 of the engine's bytes in the extent's order, b"" where ``key`` is None: of what was
    copied out, or of what arrived. Any thread may copy. ``load_bytes`` and ``save_bytes``: how much is best copied by one call;
    ``load_threads`` and ``save_threads``: how many threads do it fastest. ``save_after_seconds``: how long a save lets the engine hand over what
    it has just computed.
    """

    page_bytes: int
    block_bytes: int
    load_bytes: int
    save_bytes: int
    load_threads: int
    save_threads: int
    save_after_seconds: float

    def computed(self) -> Computed:
        """Marks the end of what the calling thread has had computed so far."""

    def save(self, entries: Sequence[Entry], key: bytes | None) -> list[bytes]:
        """Copies blocks into their extents; returns when the bytes are there."""

    def load(self, entries: Sequence[Entry], key: bytes | None) -> list[bytes]:
        """Copies extents into their blocks; returns when the bytes are there. A block left out is digested as it is in the extent."""

    def digests(self, entries: Sequence[Sequence[int]], key: bytes) -> list[bytes]:
        """The digests of these blocks, as ``save`` takes them."""

    def shared(self, holder: str, layout: bytes) -> SharedMemory:
        """Where another engine of the node finds these blocks. Raises HandoverError where it can't."""

    def reaches(self) -> list[str]:
        """The devices (``SharedMemory.device``) whose engines' blocks can be fetched."""

    def fetch(self, memory: SharedMemory, entries: Sequence[Handed], key: bytes | None) -> list[bytes]:
        """Copies another engine's blocks; returns when the bytes are there, with their digests as they arrived.

        Raises HandoverError where the memory can't be read.
        """

    def unmap(self, memory: SharedMemory) -> None:
        """Nothing is fetched from that memory any more, and nothing is being fetched."""


class Computed(Protocol):
    """The end of a computation that may still run on a device."""

    def synchronize(self) -> None:
        """Returns when it has ended."""

    def seconds_since(self, earlier: Any) -> float:
        """How long after an ``earlier`` one of the same blocks it ended; both have."""


class AlreadyComputed:
    """A processor's computation has ended when its call returns."""

    def __init__(self) -> None:
        self._ended_at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is left to wait for."""

    def seconds_since(self, earlier: AlreadyComputed) -> float:
        """Seconds between the two calls' ends."""
        return self._ended_at - earlier._ended_at


def open_blocks(kv_caches: Mapping[str, torch.Tensor], num_blocks: int, region: memoryview) -> Blocks:
    """The engine's blocks, by layer in the engine's order; every extent that they are copied to or from lies in ``region``.

    Raises UnsupportedModel where the layers' blocks can't be copied alike, RegionError where the device can't reach the region.
    """
    layers = [layer_memory(name, tensor, num_blocks) for name, tensor in kv_caches.items()]
    pages = {layer.page_bytes for layer in layers}
    if len(pages) != 1:
        raise UnsupportedModel(f"layers with blocks of different sizes ({sorted(pages)} bytes) are not supported yet")
    if layers[0].tensor.device.type == "cpu":
        return _HostBlocks(layers, num_blocks)
    # What only a GPU needs can't be imported where there is none.
    from cachebus.engine.device_blocks import DeviceBlocks

    return DeviceBlocks(layers, num_blocks, region)


class _HostBlocks:
    """Blocks in host memory. Copies and digests let go of the interpreter lock, so an engine's step goes on meanwhile."""

    def __init__(self, layers: Sequence[LayerMemory], num_blocks: int) -> None:
        self._layers = layers
        self._bytes = [_memory(layer.address, (num_blocks - 1) * layer.stride_bytes + layer.page_bytes) for layer in layers]
        self._memory = ProcessMemory(Pages([layer.address for layer in layers], num_blocks, layers[0].stride_bytes, layers[0].page_bytes))
        self.page_bytes = layers[0].page_bytes
        self.block_bytes = self.page_bytes * len(layers)
        # An entry a call, so that threads share a pull; a step's saves are one call, since one thread makes them.
        self.load_bytes, self.save_bytes = 0, 1 << 62
        self.save_threads = 1
        self.save_after_seconds = 0.0
        self.load_threads = min(LOAD_THREADS_MAX, len(os.sched_getaffinity(0)))

    def computed(self) -> Computed:
        return AlreadyComputed()

    def save(self, entries: Sequence[Entry], key: bytes | None) -> list[bytes]:
        return [self._save(entry, key) for entry in entries]

    def load(self, entries: Sequence[Entry], key: bytes | None) -> list[bytes]:
        return [self._load(entry, key) for entry in entries]

    def digests(self, entries: Sequence[Sequence[int]], key: bytes) -> list[bytes]:
        return [self._digest(blocks, key) for blocks in entries]

    def shared(self, holder: str, layout: bytes) -> SharedMemory:
        if len({layer.stride_bytes for layer in self._layers}) != 1:
            raise HandoverError("layers whose blocks lie at different distances are not offered")
        return self._memory.shared(holder, layout)

    def reaches(self) -> list[str]:
        return [self._memory.device] if len({layer.stride_bytes for layer in self._layers}) == 1 else []

    def fetch(self, memory: SharedMemory, entries: Sequence[Handed], key: bytes | None) -> list[bytes]:
        self._memory.fetch(memory, [(entry.there, entry.blocks) for entry in entries])
        return self.digests([entry.blocks for entry in entries], key) if key else [b""] * len(entries)

    def unmap(self, memory: SharedMemory) -> None:
        """Nothing was opened."""

    def _digest(self, blocks: Sequence[int], key: bytes) -> bytes:
        hasher = blake3(key=key)
        for layer, memory, block, _ in self._pages(blocks):
            start = block * layer.stride_bytes
            hasher.update(memory[start : start + self.page_bytes])
        return hasher.digest()

    def _save(self, entry: Entry, key: bytes | None) -> bytes:
        hasher, base, page = _hasher(key), address_of(entry.extent), self.page_bytes
        for layer, memory, block, place in self._pages(entry.blocks):
            start = block * layer.stride_bytes
            ctypes.memmove(base + place, layer.address + start, page)
            # Page by page: the copy has just brought it into the processor's cache.
            hasher.update(memory[start : start + page])
        return hasher.digest()

    def _load(self, entry: Entry, key: bytes | None) -> bytes:
        hasher, base, page = _hasher(key), address_of(entry.extent), self.page_bytes
        for layer, memory, block, place in self._pages(entry.blocks):
            if block < 0:
                hasher.update(entry.extent[place : place + page])
                continue
            start = block * layer.stride_bytes
            ctypes.memmove(layer.address + start, base + place, page)
            hasher.update(memory[start : start + page])
        return hasher.digest()

    def _pages(self, blocks: Sequence[int]) -> Iterator[tuple[LayerMemory, memoryview, int, int]]:
        """Layer, the layer's bytes, block and offset in the extent of every page."""
        place = 0
        for layer, memory in zip(self._layers, self._bytes, strict=True):
            for block in blocks:
                yield layer, memory, block, place
                place += self.page_bytes


class _NoHasher:
    def update(self, _data: memoryview) -> None:
        """Where nothing is checked, nothing is digested."""

    def digest(self) -> bytes:
        return b""


def _hasher(key: bytes | None) -> blake3 | _NoHasher:
    return _NoHasher() if key is None else blake3(key=key)


def _memory(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")


def address_of(memory: memoryview) -> int:
    """Where writable memory lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
