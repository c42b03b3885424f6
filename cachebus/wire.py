"""What every message on the bus is made of."""

from __future__ import annotations

from typing import Literal

import msgspec

Role = Literal["prefill", "decode"]
Tier = Literal["dram", "nvme", "redis", "peer"]
NODE_BYTES = 8
"""What names a daemon among those that keep claims; chosen anew at each start."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of everything on the wire; the tag is the class name."""
