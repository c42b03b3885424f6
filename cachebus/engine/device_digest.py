"""Keyed BLAKE3-256 of many entries at once, on a GPU: the same digest that a processor takes with the ``blake3`` package.

BLAKE3 (O'Connor, Aumasson, Neves, Wilcox-O'Hearn, 2020) is a binary tree over leaves of 1 KiB that know nothing of each other, so one lane
takes one leaf. The bytes are read where they lie: in the engine's blocks or, for a block that an engine leaves out, in the registered region.
A left child is always a full subtree, so the nodes of each level are joined in pairs and a last one without a partner moves up as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton

from cachebus.engine import blake3_kernels as kernels

LEAF_BYTES = 1024
DIGEST_BYTES = 32
_WORDS = 8
_LEAVES_AT_ONCE = 128
_PAIRS_AT_ONCE = 128
_CLIMBED_MAX, _CLIMBED_AT_ONCE, _CLIMBING_WARPS = 2048, 256, 8
"""So few nodes of an entry are joined by one program, which costs one launch instead of one a level."""


class DeviceDigest:
    """Digests entries whose bytes are ``[layer][block][page]``, on the stream that is current.

    ``addresses`` are those of the layers' first blocks (afterwards on the device: int64 [layer]), all with pages of ``page_bytes`` (a multiple of
    1024) every ``stride_bytes``.
    """

    def __init__(self, addresses: Sequence[int], stride_bytes: int, page_bytes: int, device: torch.device) -> None:
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._stride, self._device = stride_bytes, device
        self._page_leaves = page_bytes // LEAF_BYTES
        self._shapes: dict[int, torch.Tensor] = {}
        self._layers = len(addresses)
        self.blocks_for_all_kernels = _CLIMBED_MAX // (self._layers * self._page_leaves) + 1

    def key(self, key: bytes) -> torch.Tensor:
        """A key of 32 bytes as the device takes it."""
        return torch.from_numpy(np.frombuffer(key, dtype=np.uint32).copy()).to(self._device)

    def digests(self, blocks: torch.Tensor, extents: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """[entry, 8] words of digest. ``blocks``: int64 [entry, block], -1 where the entry's own bytes at ``extents`` (int64 [entry]) count."""
        entries, in_entry = blocks.shape
        leaves = self._layers * in_entry * self._page_leaves
        if in_entry not in self._shapes:
            self._shapes[in_entry] = torch.tensor([self._stride, leaves, in_entry], dtype=torch.int64, device=self._device)
        nodes = torch.empty((entries, leaves, _WORDS), dtype=torch.uint32, device=self._device)
        grid = (triton.cdiv(leaves, _LEAVES_AT_ONCE), entries)
        shape = self._shapes[in_entry]
        kernels.leaves[grid](self.addresses, blocks, extents, key, nodes, shape, PAGE_LEAVES=self._page_leaves, LANES=_LEAVES_AT_ONCE)
        while (count := nodes.shape[1]) > _CLIMBED_MAX:
            above = torch.empty((entries, -(-count // 2), _WORDS), dtype=torch.uint32, device=self._device)
            kernels.joined[(triton.cdiv(above.shape[1], _PAIRS_AT_ONCE), entries)](nodes, above, key, count, LANES=_PAIRS_AT_ONCE)
            nodes = above
        found = torch.empty((entries, _WORDS), dtype=torch.uint32, device=self._device)
        kernels.climbed[(entries,)](nodes, torch.empty_like(nodes), key, found, count, LANES=_CLIMBED_AT_ONCE, num_warps=_CLIMBING_WARPS)
        return found
