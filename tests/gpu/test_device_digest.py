"""The digest on the GPU is the one that a processor takes, wherever the bytes lie."""

from __future__ import annotations

import pytest
import torch
from blake3 import blake3

from cachebus.engine.device_digest import DeviceDigest

pytestmark = pytest.mark.gpu
KEY = bytes(range(32))
GPU = torch.device("cuda")
BLOCKS = 40


def taken(layers: list[torch.Tensor], blocks: list[list[int]], extents: list[torch.Tensor]) -> list[bytes]:
    digest = DeviceDigest([layer.data_ptr() for layer in layers], layers[0].stride(0), layers[0].shape[1], GPU)
    found = digest.digests(torch.tensor(blocks, device=GPU), torch.tensor([extent.data_ptr() for extent in extents], device=GPU), digest.key(KEY))
    return [row.cpu().numpy().tobytes() for row in found]


@pytest.mark.parametrize(("layers", "page", "in_entry"), [(1, 1024, 1), (2, 2048, 1), (3, 2048, 3), (5, 1024, 7), (32, 65536, 16), (80, 32768, 16)])
def test_it_is_what_a_processor_takes(layers: int, page: int, in_entry: int) -> None:
    memory = [torch.randint(0, 256, (BLOCKS, page), dtype=torch.uint8, device=GPU) for _ in range(layers)]
    extents = [torch.randint(0, 256, (layers * in_entry * page,), dtype=torch.uint8).pin_memory() for _ in range(3)]
    blocks = [torch.randperm(BLOCKS)[:in_entry].tolist() for _ in range(3)]
    blocks[1][0] = -1

    def expected() -> list[bytes]:
        digests = []
        for row, extent in zip(blocks, extents, strict=True):
            pages = extent.view(layers, in_entry, page)
            parts = [layer[b].cpu() if b >= 0 else pages[n, i] for n, layer in enumerate(memory) for i, b in enumerate(row)]
            digests.append(blake3(b"".join(part.numpy().tobytes() for part in parts), key=KEY).digest())
        return digests

    before = taken(memory, blocks, extents)
    assert before == expected()
    memory[-1][blocks[2][-1], page - 1] ^= 1
    after = taken(memory, blocks, extents)
    assert after == expected()
    assert [one == other for one, other in zip(before, after, strict=True)] == [blocks[2][-1] not in row for row in blocks]
