"""An engine's worker half in a process of its own, which publishes when told. ``python neighbour_engine.py RUN_DIR SHAPE``, a shape in JSON.

A JSON command a line: ``publish`` (key in hex and blocks of each chunk), ``write`` (a block and the value of its bytes), ``open``: until then
nothing is copied to the region. A line says that it is done.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cachebus.engine.blocks import Blocks, Entry, open_blocks
from cachebus.engine.publisher import Publisher
from cachebus.engine.transfer import Save, StepPlan
from cachebus.holder import Holder
from cachebus.region import Region

LAYOUT = b"l" * 16


@dataclass(frozen=True)
class Shape:
    """An engine's blocks and where they lie."""

    device: str = "cpu"
    blocks: int = 16
    page: int = 4096
    layers: int = 3

    def filled(self, seed: int) -> dict[str, torch.Tensor]:
        """Blocks whose bytes hang on the seed, the same on every device."""
        chance = torch.Generator().manual_seed(seed)
        size = (self.blocks, self.page)
        return {f"layer {n}": torch.randint(0, 256, size, dtype=torch.uint8, generator=chance).to(self.device) for n in range(self.layers)}

    def empty(self) -> dict[str, torch.Tensor]:
        return {f"layer {n}": torch.zeros(self.blocks, self.page, dtype=torch.uint8, device=self.device) for n in range(self.layers)}


class Gated:
    """Blocks that are copied to the region once it is open."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks, self.open = blocks, threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._blocks, name)

    def save(self, entries: Sequence[Entry], key: bytes | None) -> list[bytes]:
        self.open.wait()
        return self._blocks.save(entries, key)


def main(run_dir: Path, shape: Shape) -> None:
    memory = shape.filled(1)
    region = Region.map(run_dir / "region")
    blocks = Gated(open_blocks(memory, shape.blocks, region.data))
    holder = Holder(run_dir)
    publisher = Publisher(run_dir, holder, "computing", LAYOUT, blocks, region, offer=True)  # type: ignore[arg-type]
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin, 1):
        command = json.loads(line)
        if chunks := command.get("publish"):
            publisher.begin(StepPlan([], [Save(bytes.fromhex(key), some, tail=False) for key, some in chunks], number=number))
            publisher.finish()
        if "write" in command:
            block, value = command["write"]
            for tensor in memory.values():
                tensor[block] = value
            if shape.device != "cpu":
                torch.cuda.synchronize()
        if "open" in command:
            blocks.open.set()
        print("done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Shape(**json.loads(sys.argv[2])))
