"""The engine's KV cache as bytes: where each block of each layer lies, and the copies between blocks and extents.

A block's bytes are opaque: what lies where in them is the engine's affair (on a CPU it even depends on the instruction
set). An extent holds its blocks layer by layer: ``[layer][block][page bytes]``, each page as the engine keeps it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from blake3 import blake3

from cachebus.errors import UnsupportedModel


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


class Blocks(Protocol):
    """Copies between an engine's blocks and an extent; ``extent`` is the extent's bytes, -1 among ``blocks`` leaves one out.

    Each copy returns the keyed BLAKE3 of the engine's bytes in the extent's order, b"" where ``key`` is None: of what was copied out, or
    of what arrived. Any thread may copy.
    """

    page_bytes: int
    block_bytes: int

    def computed(self) -> Computed:
        """Marks the end of what the calling thread has had computed so far."""

    def save(self, blocks: Sequence[int], extent: memoryview, key: bytes | None) -> bytes:
        """Copies blocks into the extent; returns when the bytes are there."""

    def load(self, blocks: Sequence[int], extent: memoryview, key: bytes | None) -> bytes:
        """Copies the extent into blocks; returns when the bytes are there. A block left out is digested as it is in the extent."""


class Computed(Protocol):
    """The end of a computation that may still run on a device."""

    def synchronize(self) -> None:
        """Returns when it has ended."""


class _AlreadyComputed:
    def synchronize(self) -> None:
        """A processor's computation has ended when its call returns."""


def open_blocks(kv_caches: Mapping[str, torch.Tensor], num_blocks: int) -> Blocks:
    """The engine's blocks, by layer in the engine's order."""
    layers = [layer_memory(name, tensor, num_blocks) for name, tensor in kv_caches.items()]
    pages = {layer.page_bytes for layer in layers}
    if len(pages) != 1:
        raise UnsupportedModel(f"layers with blocks of different sizes ({sorted(pages)} bytes) are not supported yet")
    if layers[0].tensor.device.type == "cpu":
        return _HostBlocks(layers, num_blocks)
    return _DeviceBlocks(layers, num_blocks)


class _HostBlocks:
    """Blocks in host memory. Copies and digests let go of the interpreter lock, so an engine's step goes on meanwhile."""

    def __init__(self, layers: Sequence[LayerMemory], num_blocks: int) -> None:
        self._layers = layers
        self._bytes = [_memory(layer.address, (num_blocks - 1) * layer.stride_bytes + layer.page_bytes) for layer in layers]
        self.page_bytes = layers[0].page_bytes
        self.block_bytes = self.page_bytes * len(layers)

    def computed(self) -> Computed:
        return _AlreadyComputed()

    def save(self, blocks: Sequence[int], extent: memoryview, key: bytes | None) -> bytes:
        hasher, base, page = _hasher(key), _address(extent), self.page_bytes
        for layer, memory, block, place in self._pages(blocks):
            start = block * layer.stride_bytes
            ctypes.memmove(base + place, layer.address + start, page)
            # Page by page: the copy has just brought it into the processor's cache.
            hasher.update(memory[start : start + page])
        return hasher.digest()

    def load(self, blocks: Sequence[int], extent: memoryview, key: bytes | None) -> bytes:
        hasher, base, page = _hasher(key), _address(extent), self.page_bytes
        for layer, memory, block, place in self._pages(blocks):
            if block < 0:
                hasher.update(extent[place : place + page])
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


class _DeviceBlocks:
    """Blocks in a device's memory, copied on a stream of its own; every call returns when its copies are done."""

    def __init__(self, layers: Sequence[LayerMemory], num_blocks: int) -> None:
        self._views = [_byte_view(layer, num_blocks) for layer in layers]
        self._device = layers[0].tensor.device
        self._stream = torch.cuda.Stream(self._device)
        self.page_bytes = layers[0].page_bytes
        self.block_bytes = self.page_bytes * len(layers)

    def computed(self) -> Computed:
        event: Computed = torch.cuda.current_stream(self._device).record_event()
        return event

    def save(self, blocks: Sequence[int], extent: memoryview, key: bytes | None) -> bytes:
        host = torch.frombuffer(extent, dtype=torch.int8)
        with torch.cuda.stream(self._stream):
            host.copy_(self._gather(blocks), non_blocking=True)
        self._stream.synchronize()
        return self._digest(blocks, extent, key)

    def load(self, blocks: Sequence[int], extent: memoryview, key: bytes | None) -> bytes:
        host = torch.frombuffer(extent, dtype=torch.int8).view(len(self._views), len(blocks), self.page_bytes)
        wanted = [place for place, block in enumerate(blocks) if block >= 0]
        with torch.cuda.stream(self._stream):
            targets = torch.tensor([blocks[place] for place in wanted], device=self._device)
            for view, pages in zip(self._views, host, strict=True):
                view.index_copy_(0, targets, pages[wanted].to(self._device, non_blocking=True))
        self._stream.synchronize()
        return self._digest(blocks, extent, key)

    def _digest(self, blocks: Sequence[int], extent: memoryview, key: bytes | None) -> bytes:
        if key is None:
            return b""
        host = torch.frombuffer(extent, dtype=torch.int8).view(len(self._views), len(blocks), self.page_bytes)
        with torch.cuda.stream(self._stream):
            found = self._gather([max(block, 0) for block in blocks]).view_as(host).cpu()
        self._stream.synchronize()
        for place, block in enumerate(blocks):
            if block < 0:
                found[:, place] = host[:, place]
        return blake3(found.numpy().data, key=key).digest()

    def _gather(self, blocks: Sequence[int]) -> torch.Tensor:
        index = torch.tensor(blocks, device=self._device)
        return torch.cat([view.index_select(0, index) for view in self._views]).view(-1)


class _NoHasher:
    def update(self, _data: memoryview) -> None:
        """Where nothing is checked, nothing is digested."""

    def digest(self) -> bytes:
        return b""


def _hasher(key: bytes | None) -> blake3 | _NoHasher:
    return _NoHasher() if key is None else blake3(key=key)


def _byte_view(layer: LayerMemory, num_blocks: int) -> torch.Tensor:
    offset = layer.tensor.storage_offset() * layer.tensor.element_size()
    raw = torch.empty(0, dtype=torch.int8, device=layer.tensor.device)
    return raw.set_(layer.tensor.untyped_storage(), offset, (num_blocks, layer.page_bytes), (layer.stride_bytes, 1))


def _memory(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
