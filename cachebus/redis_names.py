"""What values in the shared tier are called.

``headstart:1:<digest key's id>:{<chunk key>}`` is a chunk's header, the same with ``:0``, ``:1``, ... its parts of a little less than 4 MiB: one hash
tag, so a cluster keeps them together. ``headstart:1:<digest key's id>:share:<tenant>:{<tag>}`` is what a tenant has at the node that keeps the tag.
"""

from __future__ import annotations

import re

PART_BYTES = (4 << 20) - 64
"""Larger values are slow on every client and server, and one of 4 MiB with what the server keeps beside it is allocated 5."""

PARTS_MAX = 33
"""Parts that are forgotten with a header, there or not: no chunk is larger than 128 MiB."""


class Names:
    """The names under one digest key; ``prefix`` begins all of them."""

    def __init__(self, key_id: bytes) -> None:
        self.prefix = f"headstart:1:{key_id.hex()}:"
        self._chunk = re.compile(re.escape(self.prefix) + r"\{([0-9a-f]{64})\}$")

    def chunk(self, key: bytes) -> str:
        """A chunk's header."""
        return self.tagged(key.hex())

    def tagged(self, tag: str) -> str:
        """The value with nothing but a hash tag: a header where the tag is a key, else there is none."""
        return f"{self.prefix}{{{tag}}}"

    def key(self, name: bytes) -> bytes | None:
        """The key of the chunk whose header is called so; None where it is no header's name."""
        found = self._chunk.match(name.decode("ascii", "replace"))
        return bytes.fromhex(found[1]) if found else None

    def account(self, tenant: bytes, tag: str) -> str:
        """What a tenant has at a node."""
        return f"{self.prefix}share:{tenant.hex()}:{{{tag}}}"


def parts(payload: memoryview) -> list[memoryview]:
    """A payload as the values that hold it."""
    return [payload[start : start + PART_BYTES] for start in range(0, len(payload), PART_BYTES)]


def part_count(length: int) -> int:
    """How many values hold a payload of so many bytes."""
    return -(-length // PART_BYTES)


def part_names(name: str, count: int) -> list[str]:
    """The names of so many parts of the chunk whose header is ``name``."""
    return [f"{name}:{number}" for number in range(count)]
