"""Blocks in a GPU's memory: copied straight from and to the registered region by the copy engines, digested where they lie.

The region is registered once, so every copy is one DMA at the speed of the bus, and no byte passes through a processor. A call hands all
its pages to the driver at once, neighbours merged; the digests are taken on the same stream: of the blocks that were
copied out, or of what arrived.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from vllm import _custom_ops

from cachebus.engine.blocks import Computed, Entry, LayerMemory, address_of
from cachebus.engine.device_digest import DIGEST_BYTES, LEAF_BYTES, DeviceDigest
from cachebus.errors import RegionError, UnsupportedModel

BATCH_BYTES = 128 << 20
"""About 2.4 ms of PCIe 5: long against the half millisecond that a call costs, short against a pull."""

LOAD_THREADS = 2
"""While one waits for its batch, the other has handed over the next."""


class DeviceBlocks:
    """Any thread may copy; each has a stream of its own. Raises RegionError where the device can't register the region."""

    def __init__(self, layers: Sequence[LayerMemory], region: memoryview) -> None:
        self.page_bytes = layers[0].page_bytes
        self.block_bytes = self.page_bytes * len(layers)
        self.load_bytes = self.save_bytes = BATCH_BYTES
        self.load_threads = LOAD_THREADS
        strides = {layer.stride_bytes for layer in layers}
        if len(strides) != 1 or self.page_bytes % LEAF_BYTES:
            raise UnsupportedModel(f"blocks of {self.page_bytes} bytes every {sorted(strides)} can't be digested on a GPU: set model.block_size")
        (self._stride,) = strides
        self._layers = layers
        self._addresses = np.array([layer.address for layer in layers], dtype=np.int64)
        self._device = layers[0].tensor.device
        self._digest = DeviceDigest([layer.address for layer in layers], self._stride, self.page_bytes, self._device)
        self._keys: dict[bytes, torch.Tensor] = {}
        self._own = threading.local()
        _register(region)
        # The kernels are compiled now, not in somebody's first token.
        self._start_digests([Entry([-1], region[: self.block_bytes])], bytes(DIGEST_BYTES))

    def computed(self) -> Computed:
        event: Computed = torch.cuda.current_stream(self._device).record_event()
        return event

    def save(self, entries: Sequence[Entry], key: bytes | None) -> list[bytes]:
        device, host, sizes = self._copies(entries)
        with torch.cuda.stream(self._stream()):
            digests = self._start_digests(entries, key)
            _custom_ops.swap_blocks_batch(device, host, sizes)
            return self._taken(digests, entries)

    def load(self, entries: Sequence[Entry], key: bytes | None) -> list[bytes]:
        device, host, sizes = self._copies(entries)
        with torch.cuda.stream(self._stream()):
            # Nobody writes a leased extent, so the copy engine may read ahead.
            _custom_ops.swap_blocks_batch(host, device, sizes, is_src_access_order_any=True)
            return self._taken(self._start_digests(entries, key), entries)

    def _stream(self) -> torch.cuda.Stream:
        stream: torch.cuda.Stream | None = getattr(self._own, "stream", None)
        if stream is None:
            torch.cuda.set_device(self._device)
            stream = self._own.stream = torch.cuda.Stream(self._device)
        return stream

    def _copies(self, entries: Sequence[Entry]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Address on the device, address in the region and length of every run of pages."""
        device, host, sizes = [], [], []
        layers = np.arange(len(self._layers), dtype=np.int64)[:, None]
        for entry in entries:
            blocks = np.asarray(entry.blocks, dtype=np.int64)
            follows = (np.diff(blocks) == 1) & (blocks[:-1] >= 0) & (self._stride == self.page_bytes)
            starts = np.flatnonzero(np.concatenate(([True], ~follows)))
            counts = np.diff(np.append(starts, len(blocks)))
            wanted = blocks[starts] >= 0
            starts, counts = starts[wanted], counts[wanted]
            device.append((self._addresses[:, None] + blocks[starts] * self._stride).ravel())
            host.append((address_of(entry.extent) + (layers * len(blocks) + starts) * self.page_bytes).ravel())
            sizes.append(np.broadcast_to(counts * self.page_bytes, (len(self._layers), len(counts))).ravel())
        found = [torch.from_numpy(np.concatenate(parts)) for parts in (device, host, sizes)]
        return found[0], found[1], found[2]

    def _start_digests(self, entries: Sequence[Entry], key: bytes | None) -> list[torch.Tensor]:
        """Digests on the device, for entries in a row that have the same number of blocks together; none without a key."""
        if key is None:
            return []
        if key not in self._keys:
            self._keys[key] = self._digest.key(key)
        found = []
        for _, group in groupby(entries, lambda entry: len(entry.blocks)):
            alike = list(group)
            blocks = torch.tensor([entry.blocks for entry in alike], dtype=torch.int64).to(self._device)
            extents = torch.tensor([address_of(entry.extent) for entry in alike], dtype=torch.int64).to(self._device)
            found.append(self._digest.digests(blocks, extents, self._keys[key]))
        return found

    def _taken(self, digests: Sequence[torch.Tensor], entries: Sequence[Entry]) -> list[bytes]:
        """Waits for all that is on the current stream."""
        torch.cuda.current_stream(self._device).synchronize()
        taken = b"".join(words.cpu().numpy().tobytes() for words in digests)
        return [taken[place : place + DIGEST_BYTES] for place in range(0, len(taken), DIGEST_BYTES)] or [b""] * len(entries)


def _register(region: memoryview) -> None:
    error = torch.cuda.cudart().cudaHostRegister(address_of(region), len(region), 0)
    if error.value:
        raise RegionError(f"the GPU can't register the region of {len(region)} bytes ({error}): lower cache.max_local_cpu_size, or raise ulimit -l")
