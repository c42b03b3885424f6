"""Fetches pages from the registered region, or out of another engine's blocks, into blocks, on a few of a GPU's own processors, in Triton.

One launch, however many pages there are and wherever they lie. vLLM's offloading has such a kernel for pages too small for the copy engines; here
it is what keeps a driver that is handed thousands of copies from holding up everybody else's launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS = 16
"""They fill a PCIe 5 bus and take an eighth of an H200's processors, which a batch that generates can spare; 32 fetch no faster and slow it down."""

_WARPS = 8


def fetch(layers: torch.Tensor, blocks: torch.Tensor, extents: torch.Tensor, stride_bytes: int, page_bytes: int) -> None:
    """Queues the copies on the stream that is current.

    ``layers``: int64 [layer], addresses of the layers' first blocks, which lie every ``stride_bytes``; ``blocks``: int64 [entry, block], -1 where a
    page stays out; ``extents``: int64 [entry], address of each entry's bytes, ``[layer][block][page]``. All addresses and ``page_bytes`` are
    multiples of 1024.
    """
    entries, in_entry = blocks.shape
    pages = entries * len(layers) * in_entry
    constants = {"LAYERS": len(layers), "STRIDE_BYTES": stride_bytes, "PAGE_BYTES": page_bytes}
    fetched[(PROGRAMS,)](layers, blocks, extents, in_entry, pages, **constants, num_warps=_WARPS)


def fetch_blocks(layers: torch.Tensor, sources: torch.Tensor, blocks: torch.Tensor, stride_bytes: int, page_bytes: int) -> None:
    """The same out of another engine's blocks, which lie as far apart as those here.

    ``sources``: int64 [layer], addresses of its layers' first blocks; ``blocks``: int64 [2, entry, block], those here and those there.
    """
    _, entries, in_entry = blocks.shape
    pages = entries * len(layers) * in_entry
    constants = {"LAYERS": len(layers), "STRIDE_BYTES": stride_bytes, "PAGE_BYTES": page_bytes}
    fetched_blocks[(PROGRAMS,)](layers, sources, blocks, in_entry, pages, **constants, num_warps=_WARPS)


@triton.jit(do_not_specialize=["in_entry", "pages"])
def fetched(layers, blocks, extents, in_entry, pages, LAYERS: tl.constexpr, STRIDE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr):
    """Program ``p`` of ``n`` copies the pages ``p``, ``p + n``, ... of all entries; ``pages``: how many there are."""
    number = tl.program_id(0).to(tl.int64)
    while number < pages:
        entry, page = number // (LAYERS * in_entry), number % (LAYERS * in_entry)
        block = tl.load(blocks + entry * in_entry + page % in_entry)
        if block >= 0:
            source = (tl.load(extents + entry) + page * PAGE_BYTES).to(tl.pointer_type(tl.int64))
            target = (tl.load(layers + page // in_entry) + block * STRIDE_BYTES).to(tl.pointer_type(tl.int64))
            _copied(source, target, PAGE_BYTES)
        number += tl.num_programs(0)


@triton.jit(do_not_specialize=["in_entry", "pages"])
def fetched_blocks(layers, sources, blocks, in_entry, pages, LAYERS: tl.constexpr, STRIDE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr):
    """The same from blocks to blocks; the second half of ``blocks`` says which of the other engine's."""
    number = tl.program_id(0).to(tl.int64)
    while number < pages:
        entry, page = number // (LAYERS * in_entry), number % (LAYERS * in_entry)
        place = blocks + entry * in_entry + page % in_entry
        block = tl.load(place)
        if block >= 0:
            there = tl.load(place + pages // LAYERS)
            source = (tl.load(sources + page // in_entry) + there * STRIDE_BYTES).to(tl.pointer_type(tl.int64))
            target = (tl.load(layers + page // in_entry) + block * STRIDE_BYTES).to(tl.pointer_type(tl.int64))
            _copied(source, target, PAGE_BYTES)
        number += tl.num_programs(0)


@triton.jit
def _copied(source, target, PAGE_BYTES: tl.constexpr):
    TILE_BYTES: tl.constexpr = 16384 if PAGE_BYTES % 16384 == 0 else (4096 if PAGE_BYTES % 4096 == 0 else 1024)
    lanes = tl.arange(0, TILE_BYTES // 8)
    # Two lanes' words are one load.
    source, target = tl.multiple_of(source, 16), tl.multiple_of(target, 16)
    for tile in range(PAGE_BYTES // TILE_BYTES):
        place = tile * (TILE_BYTES // 8) + lanes
        tl.store(target + place, tl.load(source + place))
