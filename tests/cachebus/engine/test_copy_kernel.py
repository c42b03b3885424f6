"""The kernels that fetch pages, as Triton's interpreter runs them on a processor: what is copied where, not how fast."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import torch
from cachebus.engine import copy_kernel

LAYERS, BLOCKS, PAGE = 3, 20, {page}
torch.manual_seed(1)
theirs = [torch.randint(0, 256, (BLOCKS, PAGE), dtype=torch.uint8) for _ in range(LAYERS)]
own = [torch.zeros(BLOCKS, PAGE, dtype=torch.uint8) for _ in range(LAYERS)]
here, there = [[3, 9], [0, -1], [15, 4]], [[1, 2], [5, 6], [19, 0]]
layers, sources = (torch.tensor([tensor.data_ptr() for tensor in tensors]) for tensors in (own, theirs))

copy_kernel.fetch_blocks(layers, sources, torch.tensor([here, there]), PAGE, PAGE)
moved = {{block: source for blocks, some in zip(here, there) for block, source in zip(blocks, some) if block >= 0}}
for tensor, source in zip(own, theirs):
    for block in range(BLOCKS):
        assert torch.equal(tensor[block], source[moved[block]] if block in moved else torch.zeros_like(source[0])), block

extents = torch.randint(0, 256, (3, LAYERS, 2, PAGE), dtype=torch.uint8)
copy_kernel.fetch(layers, torch.tensor(here), torch.tensor([extent.data_ptr() for extent in extents]), PAGE, PAGE)
for extent, blocks in zip(extents, here):
    for place, block in enumerate(blocks):
        assert block < 0 or all(torch.equal(own[layer][block], extent[layer, place]) for layer in range(LAYERS))
"""


@pytest.mark.parametrize("page", [1024, 4096, 32768], ids=["tiles of 1 KiB", "of 4 KiB", "two tiles"])
def test_pages_go_where_they_belong(page: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(page=page)], check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
