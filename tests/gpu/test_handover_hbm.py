"""Blocks read out of another process's memory on the same GPU: byte for byte, at the speed of HBM, and let go of when that process is dead."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import float32_on_gpu
import pytest
import torch
from follow import run_killed
from handover_engines import Computing, Following
from neighbour_engine import Shape
from offline_node import offline_node
from tests_shared import Bus, wait_for

from cachebus.engine.blocks import Handed

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
IN_CHUNK, CHUNKS = 16, 32
SHAPE = Shape("cuda", blocks=CHUNKS * IN_CHUNK, page=65536, layers=32)
"""A GiB as Llama 3.1 8B has it in bf16."""
GIGABYTES = SHAPE.blocks * SHAPE.page * SHAPE.layers / 1e9
GB_PER_SECOND_MIN = 200.0
"""Four times what the bus between GPU and host carries."""


def rows(order: torch.Tensor) -> list[list[int]]:
    found: list[list[int]] = order.view(CHUNKS, IN_CHUNK).tolist()
    return found


@pytest.fixture
def engines(bus: Bus) -> Iterator[tuple[Computing, Following]]:
    """Its region is so small that nothing comes through it."""
    computing, following = Computing(bus, SHAPE), Following(bus, SHAPE)
    yield computing, following
    computing.kill()
    following.stop()


def test_a_prompt_is_read_at_the_speed_of_hbm_and_its_memory_is_free_when_its_engine_is_killed(
    bus: Bus, engines: tuple[Computing, Following], capsys: pytest.CaptureFixture[str]
) -> None:
    computing, following = engines
    source, blocks = SHAPE.filled(1), following.blocks
    there, here = rows(torch.randperm(SHAPE.blocks)), rows(torch.randperm(SHAPE.blocks))
    seconds = []
    for _ in range(4):
        keys = [secrets.token_bytes(32) for _ in there]
        for tensor in following.memory.values():
            tensor.zero_()
        torch.cuda.synchronize()
        following.follow(keys, here)
        wait_for(lambda: bus.daemon.statistics()["waiters"] == 1)
        started = time.perf_counter()
        computing.publish(keys, there)
        assert following.ended() == set()
        seconds.append(time.perf_counter() - started)
        assert following.has(source, there, here)
    assert following.mover.counts["handed_chunks"] == 4 * CHUNKS
    assert bus.daemon.statistics()["chunks"] == 0

    (memory,) = following.mover._neighbours._memories.values()
    entries = [Handed(own, theirs) for own, theirs in zip(here, there, strict=True)]
    with capsys.disabled():
        print(f"\n{GIGABYTES:.2f} GB from the end of a step to the end of the pull: {[round(1000 * one, 1) for one in seconds]} ms")
        for key, text in ((None, "without"), (b"k" * 32, "with")):
            taken = []
            for _ in range(7):
                begun = time.perf_counter()
                blocks.fetch(memory, entries, key)
                taken.append(time.perf_counter() - begun)
            rate = GIGABYTES / statistics.median(taken)
            print(f"a call {text} digest: {rate:.0f} GB/s")
            assert rate >= GB_PER_SECOND_MIN

    free = torch.cuda.mem_get_info()[0]
    # It looks who lives in some seconds only: what is read here is not closed meanwhile.
    following.mover._neighbours._looked_at = time.monotonic() + 4
    computing.kill()
    # The driver keeps the memory until it is closed here, so it is read as before, or refused: nothing else.
    for tensor in following.memory.values():
        tensor.zero_()
    torch.cuda.synchronize()
    digests = blocks.fetch(memory, entries, b"k" * 32)
    with capsys.disabled():
        print(f"after its engine was killed the memory is {'there' if following.has(source, there, here) else 'NOT what it was'}")
    assert len(digests) == CHUNKS
    wait_for(lambda: not following.mover._neighbours.known, 20)
    torch.cuda.synchronize()
    wait_for(lambda: torch.cuda.mem_get_info()[0] - free > 0.9 * GIGABYTES * 1e9, 10)


def test_a_step_whose_chunks_change_on_the_way_is_noticed(bus: Bus, engines: tuple[Computing, Following]) -> None:
    computing, following = engines
    there, here = rows(torch.randperm(SHAPE.blocks)), rows(torch.randperm(SHAPE.blocks))
    keys = [secrets.token_bytes(32) for _ in there]
    computing.publish(keys, there)
    wait_for(lambda: bus.daemon.statistics()["offers"] == CHUNKS)
    computing.tell(write=[there[7][3], 5])
    following.follow(keys, here, wait_ms=200)
    assert following.ended() == set(here[7])
    assert following.mover.counts["stale_offers"] == 1


def test_an_engine_that_is_killed_while_it_is_read_leaves_right_tokens_and_room_for_the_next_one(tmp_path: Path) -> None:
    options = {**float32_on_gpu.OPTIONS, "max_model_len": 16384, "max_num_batched_tokens": 512}
    with offline_node(4.0, tmp_path, options, float32_on_gpu.ENVIRONMENT, ["cache.handover=hbm"]) as node:
        run_killed(node, 15009, answer=24)
