"""Blocks in a GPU's memory: copied straight from and to the registered region, digested where they lie.

The region is registered once, so bytes cross the bus at its speed and none passes through a processor of the host. Out of the blocks they go by
the copy engines: a call hands all its pages to the driver at once, neighbours merged. So they do into blocks that lie in a row, as in an engine that
is new. Scattered ones, as a prefix has them later, are fetched by a kernel on a few of the GPU's own processors: while the driver takes thousands of
copies no other thread of the process launches anything, so a batch that generated stood still. The digests are taken on the same stream: of the
blocks that were copied out, or of what arrived.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch
from vllm import _custom_ops

from cachebus.engine import copy_kernel
from cachebus.engine.blocks import Computed, Entry, Handed, LayerMemory, address_of
from cachebus.engine.device_digest import DIGEST_BYTES, LEAF_BYTES, DeviceDigest
from cachebus.engine.device_neighbours import DeviceNeighbours, described
from cachebus.errors import RegionError, UnsupportedModel
from cachebus.messages_handover import SharedMemory

SAVE_BATCH_BYTES = 128 << 20
"""About 2.4 ms of PCIe 5: long against the half millisecond that a call costs, short against a step."""

LOAD_BATCH_BYTES = 512 << 20
"""About 10 ms: a call takes the interpreter for two or three milliseconds while an engine steps, however much it fetches."""

ROW_BYTES_MIN = 256 << 10
"""In the mean of a call; from here on the copy engines fetch it, faster than the kernel by a twentieth. At most 2,048 copies a call: the driver takes
them in about a millisecond."""

THREADS = 2
"""While one waits for its batch, the other has handed over the next."""

_Tables = list[tuple[torch.Tensor, torch.Tensor]]
"""On the device, of entries with equally many blocks each: blocks [entry, block], and the address of each entry's extent [entry]"""

SAVE_AFTER_SECONDS = 0.002
"""The engine takes about a millisecond from a step's last kernel to the tokens' way out."""


class DeviceBlocks:
    """Any thread may copy; each has a stream of its own. Raises RegionError where the device can't register the region."""

    def __init__(self, layers: Sequence[LayerMemory], num_blocks: int, region: memoryview) -> None:
        self.page_bytes = layers[0].page_bytes
        self.block_bytes = self.page_bytes * len(layers)
        self.load_bytes, self.save_bytes = LOAD_BATCH_BYTES, SAVE_BATCH_BYTES
        self.load_threads = self.save_threads = THREADS
        self.save_after_seconds = SAVE_AFTER_SECONDS
        strides = {layer.stride_bytes for layer in layers}
        if len(strides) != 1 or self.page_bytes % LEAF_BYTES:
            raise UnsupportedModel(f"blocks of {self.page_bytes} bytes every {sorted(strides)} can't be digested on a GPU: set model.block_size")
        (self._stride,) = strides
        self._addresses = np.array([layer.address for layer in layers], dtype=np.int64)
        self._device = layers[0].tensor.device
        self._digest = DeviceDigest([layer.address for layer in layers], self._stride, self.page_bytes, self._device)
        self._count, self._any_extent = num_blocks, region[:1]
        self._neighbours = DeviceNeighbours(self._device, len(layers), self._stride, self.page_bytes)
        self._keys: dict[bytes, torch.Tensor] = {}
        self._threads = threading.local()
        _register(region)
        # The kernels are compiled now, not in somebody's first token: of an entry so long that none of them is left out.
        own = self._of_this_thread()
        blocks = [0] * self._digest.blocks_for_all_kernels
        with torch.cuda.stream(own.stream):
            own.taken(self._digests(self._tables([_Alike([Entry(blocks, region)])], own), bytes(DIGEST_BYTES)), [])
            # Of a page that stays out.
            self._fetch(self._tables([_Alike([Entry([-1], region)])], own))
            own.stream.synchronize()

    def computed(self) -> Computed:
        return _Computed(self._device)

    def save(self, entries: Sequence[Entry], key: bytes | None) -> list[bytes]:
        own = self._of_this_thread()
        with torch.cuda.stream(own.stream):
            alike = [_Alike(group) for group in _by_blocks(entries)]
            device, host, sizes = self._copies(alike)
            _custom_ops.swap_blocks_batch(device, host, sizes)
            return own.taken(self._digests(self._tables(alike, own), key) if key else [], entries)

    def load(self, entries: Sequence[Entry], key: bytes | None) -> list[bytes]:
        own = self._of_this_thread()
        with torch.cuda.stream(own.stream):
            alike = [_Alike(group) for group in _by_blocks(entries)]
            tables = self._tables(alike, own)
            if self._are_in_rows(alike):
                device, host, sizes = self._copies(alike)
                # Nobody writes a leased extent, so the copy engine may read ahead.
                _custom_ops.swap_blocks_batch(host, device, sizes, is_src_access_order_any=True)
            else:
                self._fetch(tables)
            return own.taken(self._digests(tables, key) if key else [], entries)

    def digests(self, entries: Sequence[Sequence[int]], key: bytes) -> list[bytes]:
        own = self._of_this_thread()
        with torch.cuda.stream(own.stream):
            alike = [_Alike(group) for group in _by_blocks([Entry(blocks, self._any_extent) for blocks in entries])]
            return own.taken(self._digests(self._tables(alike, own), key), entries)

    def shared(self, holder: str, layout: bytes) -> SharedMemory:
        self._of_this_thread()
        return described(self._device, self._addresses.tolist(), self._count, (self._stride, self.page_bytes), (holder, layout))

    def reaches(self) -> list[str]:
        own = self._of_this_thread()
        with torch.cuda.stream(own.stream):
            # The kernel is compiled now, of a page that stays out.
            self._fetch_blocks(own.on_device([np.full((2, 1, 1), -1, dtype=np.int64)]), self._digest.addresses)
            own.stream.synchronize()
        return self._neighbours.reaches()

    def fetch(self, memory: SharedMemory, entries: Sequence[Handed], key: bytes | None) -> list[bytes]:
        own = self._of_this_thread()
        with torch.cuda.stream(own.stream):
            sources = self._neighbours.layers(memory, [block for entry in entries for block in entry.there])
            groups = list(_by_blocks(entries))
            moved = [np.array([[entry.blocks for entry in group], [entry.there for entry in group]], dtype=np.int64) for group in groups]
            unread = [np.zeros(len(group), dtype=np.int64) for group in groups]
            tables = own.on_device([*moved, *unread])
            self._fetch_blocks(tables[: len(groups)], sources)
            arrived = [(table[0], extents) for table, extents in zip(tables[: len(groups)], tables[len(groups) :], strict=True)]
            return own.taken(self._digests(arrived, key) if key else [], entries)

    def unmap(self, memory: SharedMemory) -> None:
        self._of_this_thread()
        self._neighbours.unmap(memory)

    def _of_this_thread(self) -> _Own:
        own: _Own | None = getattr(self._threads, "own", None)
        if own is None:
            torch.cuda.set_device(self._device)
            own = self._threads.own = _Own(self._device)
        return own

    def _copies(self, alike: Sequence[_Alike]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Address on the device, address in the region and length of every run of pages."""
        found = [torch.from_numpy(np.concatenate(parts)) for parts in zip(*(self._runs(group) for group in alike), strict=True)]
        return found[0], found[1], found[2]

    def _runs(self, alike: _Alike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same for entries with equally many blocks. Blocks that follow each other in both places are one run."""
        blocks, (entries, in_entry) = alike.blocks, alike.blocks.shape
        places = np.flatnonzero(self._begins(blocks))
        counts = np.diff(np.append(places, entries * in_entry))
        wanted = blocks.ravel()[places] >= 0
        places, counts = places[wanted], counts[wanted]
        device = self._addresses[:, None] + blocks.ravel()[places] * self._stride
        layers = np.arange(len(self._addresses), dtype=np.int64)[:, None] * (in_entry * self.page_bytes)
        host = layers + (alike.extents[places // in_entry] + places % in_entry * self.page_bytes)
        sizes = np.broadcast_to(counts * self.page_bytes, device.shape)
        return device.ravel(), host.ravel(), sizes.ravel()

    def _begins(self, blocks: np.ndarray) -> np.ndarray:
        """Which blocks [entry, block] don't go on where the one before ends; those that stay out begin something, too."""
        begins = np.ones(blocks.shape, dtype=bool)
        if self._stride == self.page_bytes:
            begins[:, 1:] = (np.diff(blocks) != 1) | (blocks[:, :-1] < 0)
        return begins

    def _are_in_rows(self, alike: Sequence[_Alike]) -> bool:
        """Whether the blocks lie so much in a row that the driver gets few copies."""
        runs = sum(int(np.count_nonzero(self._begins(group.blocks) & (group.blocks >= 0))) for group in alike)
        pages = sum(int(np.count_nonzero(group.blocks >= 0)) for group in alike)
        return runs * ROW_BYTES_MIN <= pages * self.page_bytes

    def _tables(self, alike: Sequence[_Alike], own: _Own) -> _Tables:
        tables = own.on_device([table for group in alike for table in (group.blocks, group.extents)])
        return list(zip(tables[::2], tables[1::2], strict=True))

    def _fetch(self, tables: _Tables) -> None:
        for blocks, extents in tables:
            copy_kernel.fetch(self._digest.addresses, blocks, extents, self._stride, self.page_bytes)

    def _fetch_blocks(self, tables: Sequence[torch.Tensor], sources: torch.Tensor) -> None:
        for blocks in tables:
            copy_kernel.fetch_blocks(self._digest.addresses, sources, blocks, self._stride, self.page_bytes)

    def _digests(self, tables: _Tables, key: bytes) -> list[torch.Tensor]:
        if key not in self._keys:
            self._keys[key] = self._digest.key(key)
        return [self._digest.digests(blocks, extents, self._keys[key]) for blocks, extents in tables]


class _Computed:
    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(torch.cuda.current_stream(device))

    def synchronize(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: _Computed) -> float:
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1000


class _Own:
    """A thread's stream, and pinned memory from which its tables go to the device behind the copies, without waiting for them."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._device = device
        self._staging = torch.empty(0, dtype=torch.int64)

    def on_device(self, tables: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The tables on the device, each at a multiple of 16 bytes: kernels are compiled for that. Good until the next call."""
        places = np.cumsum([0, *(-(-table.size // 2) * 2 for table in tables)]).tolist()
        if len(self._staging) < places[-1]:
            self._staging = torch.empty(2 * places[-1], dtype=torch.int64, pin_memory=True)
        for table, place in zip(tables, places[:-1], strict=True):
            self._staging[place : place + table.size] = torch.from_numpy(table.ravel())
        there = self._staging[: places[-1]].to(self._device, non_blocking=True)
        return [there[place : place + table.size].view(table.shape) for table, place in zip(tables, places[:-1], strict=True)]

    def taken(self, digests: Sequence[torch.Tensor], entries: Sequence[object]) -> list[bytes]:
        """Waits for all that is on the stream."""
        self.stream.synchronize()
        taken = b"".join(words.cpu().numpy().tobytes() for words in digests)
        return [taken[place : place + DIGEST_BYTES] for place in range(0, len(taken), DIGEST_BYTES)] or [b""] * len(entries)


class _Alike:
    """Entries with equally many blocks: ``blocks`` [entry, block] and ``extents``, the address of each."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.blocks = np.array([entry.blocks for entry in entries], dtype=np.int64)
        self.extents = np.array([address_of(entry.extent) for entry in entries], dtype=np.int64)


_Some = TypeVar("_Some", Entry, Handed)


def _by_blocks(entries: Sequence[_Some]) -> Iterator[list[_Some]]:
    """Entries in a row with equally many blocks."""
    return (list(group) for _, group in groupby(entries, lambda entry: len(entry.blocks)))


def _register(region: memoryview) -> None:
    error = torch.cuda.cudart().cudaHostRegister(address_of(region), len(region), 0)
    if error.value:
        raise RegionError(
            f"the GPU can't register the region of {len(region)} bytes (CUDA error {error.value}): it must lie on a tmpfs such as /dev/shm; "
            "lower cache.max_local_cpu_size, or raise ulimit -l"
        )
