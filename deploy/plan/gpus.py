"""GPUs that can be planned with: what their makers state, and what an hour of one may cost. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU by its maker's figures: bytes, bytes a second, dense FLOP/s. ``link`` is the bytes a second of pinned copies over its PCIe.

    ``price`` is dollars an hour, a mark of the order only: whoever plans gives theirs.
    """

    name: str
    memory: float
    bandwidth: float
    bf16: float
    fp8: float
    link: float
    price: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("l4", 24e9, 0.30e12, 121e12, 242e12, 25e9, 0.80),
        Gpu("l40s", 48e9, 0.864e12, 362e12, 733e12, 25e9, 1.20),
        Gpu("a100", 80e9, 2.04e12, 312e12, 312e12, 25e9, 1.80),
        Gpu("h20", 96e9, 4.0e12, 148e12, 296e12, 55e9, 1.80),
        Gpu("h100", 80e9, 3.35e12, 989e12, 1979e12, 55e9, 2.80),
        Gpu("h200", 141e9, 4.8e12, 989e12, 1979e12, 55e9, 3.80),
        Gpu("b200", 180e9, 8.0e12, 2250e12, 4500e12, 55e9, 5.50),
    )
}
"""A100 has no fp8 units: weights in fp8 save memory there, no time. PCIe 4 x16 is taken as 25 GB/s, PCIe 5 as the 55 measured on H200."""
