"""Copies between a GPU's blocks and the region: byte for byte, digested alike on both sides, at the speed of the bus."""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from blake3 import blake3

from cachebus.engine.blocks import Entry, address_of, open_blocks
from cachebus.engine.device_blocks import _Alike

pytestmark = pytest.mark.gpu
KEY = bytes(range(32))
LAYERS, PAGE, IN_CHUNK = 32, 65536, 16
CHUNK_BYTES = LAYERS * PAGE * IN_CHUNK
CHUNKS = 32
BLOCKS = CHUNKS * IN_CHUNK
SHARE_OF_BUS_MIN = {("load", "neighbours"): 0.85, ("load", "shuffled"): 0.75, ("save", "neighbours"): 0.75, ("save", "shuffled"): 0.45}
"""One call alone; one that saves hands over all its pages before the first byte moves. Pulls have two calls under way."""


@pytest.fixture(scope="module")
def region() -> Iterator[memoryview]:
    memory = memoryview(mmap.mmap(-1, CHUNKS * CHUNK_BYTES))
    yield memory
    # Or whatever is mapped there next is read by the GPU as these bytes.
    torch.cuda.synchronize()
    assert torch.cuda.cudart().cudaHostUnregister(address_of(memory)).value == 0


def caches() -> dict[str, torch.Tensor]:
    return {f"layer {n}": torch.randint(0, 256, (BLOCKS, PAGE), dtype=torch.uint8, device="cuda") for n in range(LAYERS)}


def entries(region: memoryview, order: torch.Tensor) -> list[Entry]:
    rows = order.view(CHUNKS, IN_CHUNK).tolist()
    return [Entry(row, region[n * CHUNK_BYTES : (n + 1) * CHUNK_BYTES]) for n, row in enumerate(rows)]


def seconds(work: Callable[[], object]) -> float:
    found = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def test_copies_are_right_and_as_fast_as_the_bus(region: memoryview, capsys: pytest.CaptureFixture[str]) -> None:
    source = caches()
    blocks = open_blocks(source, BLOCKS, region)
    shuffled, in_order = entries(region, torch.randperm(BLOCKS)), entries(region, torch.arange(BLOCKS))
    # In a row, half in a row, scattered: by the copy engines, and by the kernel.
    for some in (in_order, entries(region, torch.cat([torch.arange(BLOCKS // 2), BLOCKS // 2 + torch.randperm(BLOCKS // 2)])), shuffled):
        digests = blocks.save(some, KEY)
        assert digests == [blake3(entry.extent, key=KEY).digest() for entry in some]
        first = torch.stack([source["layer 3"][block] for block in some[5].blocks]).cpu().numpy().tobytes()
        assert bytes(some[5].extent[3 * IN_CHUNK * PAGE : 4 * IN_CHUNK * PAGE]) == first
        before = {name: tensor.clone() for name, tensor in source.items()}
        for tensor in source.values():
            tensor.zero_()
        assert blocks.load(some, KEY) == digests
        assert all(torch.equal(tensor, before[name]) for name, tensor in source.items())
    region[7 * CHUNK_BYTES + 12345] ^= 1
    assert [one == other for one, other in zip(blocks.load(shuffled, KEY), digests, strict=True)] == [n != 7 for n in range(CHUNKS)]
    region[7 * CHUNK_BYTES + 12345] ^= 1
    left_out = [Entry([-1, *shuffled[0].blocks[1:]], shuffled[0].extent)]
    source["layer 0"][shuffled[0].blocks[0]] ^= 1
    changed = source["layer 0"][shuffled[0].blocks[0]].clone()
    assert blocks.load(left_out, KEY) == digests[:1]
    assert torch.equal(source["layer 0"][shuffled[0].blocks[0]], changed)

    total = CHUNKS * CHUNK_BYTES
    pinned = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(total, dtype=torch.uint8, device="cuda")
    into, out = seconds(lambda: device.copy_(pinned, non_blocking=True)), seconds(lambda: pinned.copy_(device, non_blocking=True))
    with capsys.disabled():
        print()
        for name, some in (("neighbours", in_order), ("shuffled", shuffled)):
            for way, limit, work in (("load", into, blocks.load), ("save", out, blocks.save)):
                for key in (KEY, None):
                    batch = seconds(lambda work=work, some=some, key=key: work(some, key))
                    text = "with digest" if key else "without"
                    print(f"{way}, {name}, {text}: {total / batch / 1e9:.1f} GB/s, {limit / batch:.2f} of one pinned copy")
                    assert limit / batch >= SHARE_OF_BUS_MIN[way, name]
        for some in (in_order, in_order[:4]):
            own = blocks._of_this_thread()  # type: ignore[attr-defined]
            with torch.cuda.stream(own.stream):
                tables = blocks._tables([_Alike(some)], own)  # type: ignore[attr-defined]
                alone = seconds(lambda tables=tables: blocks._digests(tables, KEY))  # type: ignore[attr-defined]
            print(f"digests of {len(some)} chunks: {1000 * alone:.3f} ms, {len(some) * CHUNK_BYTES / alone / 1e9:.0f} GB/s")
