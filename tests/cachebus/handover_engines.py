"""Two engines' worker halves on one bus: one in a process of its own computes, one in this process follows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from neighbour_engine import LAYOUT, Shape
from tests_shared import Bus

from cachebus.engine.blocks import AlreadyComputed, address_of, open_blocks
from cachebus.engine.mover import Mover
from cachebus.engine.transfer import Coming, Follow, Load
from cachebus.holder import Holder
from cachebus.region import Region


class Computing:
    """The engine that computes."""

    def __init__(self, bus: Bus, shape: Shape) -> None:
        script = Path(__file__).parent / "neighbour_engine.py"
        command = [sys.executable, str(script), str(bus.run_dir), json.dumps(asdict(shape))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._line()

    def tell(self, **command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        self._line()

    def publish(self, keys: Sequence[bytes], blocks: Sequence[Sequence[int]]) -> None:
        self.tell(publish=[(key.hex(), list(there)) for key, there in zip(keys, blocks, strict=True)])

    def _line(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline(), "the engine ended"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


class Following:
    """The engine that follows."""

    def __init__(self, bus: Bus, shape: Shape, *, verify: bool = True) -> None:
        self.memory, self._device = shape.empty(), shape.device
        self.region, self.holder = Region.map(bus.run_dir / "region"), Holder(bus.run_dir)
        self.blocks = open_blocks(self.memory, shape.blocks, self.region.data)
        self.mover = Mover(bus.run_dir, self.holder, "following", self.blocks, self.region, verify=verify, wait_ms_max=500, take_offers=True)
        self.mover.start()

    def follow(self, keys: Sequence[bytes], blocks: Sequence[Sequence[int]], wait_ms: int = 2000) -> None:
        coming = [Coming(key, list(some)) for key, some in zip(keys, blocks, strict=True)]
        self.mover.submit(Load("r", 0, [], 0, Follow(self.holder.id, LAYOUT, wait_ms, coming)), AlreadyComputed())

    def ended(self, seconds: float = 10) -> set[int]:
        """The blocks whose bytes are not good, once the load has ended."""
        deadline = time.monotonic() + seconds
        invalid: set[int] = set()
        while time.monotonic() < deadline:
            finished, bad = self.mover.take_finished(0.1)
            invalid |= bad
            if finished:
                return invalid
        raise AssertionError("the load did not end")

    def has(self, source: dict[str, torch.Tensor], there: Sequence[Sequence[int]], here: Sequence[Sequence[int]]) -> bool:
        theirs, own = [block for blocks in there for block in blocks], [block for blocks in here for block in blocks]
        return all(torch.equal(self.memory[name][own], tensor[theirs]) for name, tensor in source.items())

    def stop(self) -> None:
        self.mover.stop()
        if self._device != "cpu":
            # Or whatever is mapped there next is read by the GPU as these bytes.
            torch.cuda.synchronize()
            assert torch.cuda.cudart().cudaHostUnregister(address_of(self.region.data)).value == 0
