"""The simulated model and its KV cache: bytes that depend on the whole prefix, and a next token that depends on all bytes read.

Each layer keeps 8 bytes a token: ``c[i] = c[i - 1] * factor + token[i] + 1`` modulo 2^64, so a token's KV is a hash chain over everything up
to it, and what is computed after a wrong prefix is wrong as well. The next token is taken from BLAKE3 over the KV of all tokens. A request's
first and last token read all of it from the blocks; those between read what came since, as the rest was hashed before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cachebus.engine.blocks import AlreadyComputed, Computed, Entry, Handed
from cachebus.engine.process_memory import Pages, ProcessMemory
from cachebus.messages_handover import SharedMemory
from deploy.sim.profile import Profile
from deploy.sim.scheduler import Part, Work
from deploy.sim.vocabulary import FIRST_WORD, WORDS

_ENTRY_BYTES = 8
_ODD_INVERSE_ROUNDS = 6


class Model:
    """An engine's KV, ``[block][token][layer]``, and what is computed with it. One thread computes; any may copy.

    It is the ``Blocks`` of ``cachebus.engine.blocks``: an extent holds its blocks one after the other. ``speed`` divides every time.
    """

    def __init__(self, profile: Profile, speed: float) -> None:
        self._profile, self._speed = profile, speed
        self._block_size = profile.block_size
        self._kv = np.zeros((profile.blocks, profile.block_size, profile.layers), np.uint64)
        self._pages = self._kv.reshape(profile.blocks, -1).view(np.uint8)
        self.page_bytes = self.block_bytes = profile.block_size * profile.layers * _ENTRY_BYTES
        self._memory = ProcessMemory(Pages([self._kv.ctypes.data], profile.blocks, self.block_bytes, self.page_bytes))
        # One call a pull and a step, so that its time is that of all its bytes.
        self.load_bytes = self.save_bytes = 1 << 62
        self.load_threads = self.save_threads = 1
        self.save_after_seconds = 0.0
        constants = [blake3(f"{profile.model} layer {layer}".encode()).digest() for layer in range(profile.layers)]
        factors = [int.from_bytes(constant[:8], "little") | 1 for constant in constants]
        self._seed = np.array([int.from_bytes(constant[8:16], "little") for constant in constants], np.uint64)
        self._factors = np.array(factors, np.uint64)
        self._powers, self._inverses = _powers(factors, profile.max_num_batched_tokens)
        self._readers: dict[str, tuple[blake3, int]] = {}

    def forward(self, parts: Sequence[Part]) -> list[int | None]:
        """Computes a step; the next token of each part that samples."""
        single = [part for part in parts if part.tokens == 1 and part.computed]
        if single:
            self._extend_each(single)
        for part in parts:
            if part.tokens > 1 or not part.computed:
                self._extend(part)
        return [self._sample(part.work) if part.samples else None for part in parts]

    def forget(self, request_id: str) -> None:
        """The request ended or lost its blocks."""
        self._readers.pop(request_id, None)

    def _extend_each(self, parts: Sequence[Part]) -> None:
        """One token for each part, all at once."""
        before = [self._place(part.work, part.computed - 1) for part in parts]
        places = [self._place(part.work, part.computed) for part in parts]
        tokens = np.array([part.work.tokens[part.computed] + 1 for part in parts], np.uint64)
        previous = self._kv[[block for block, _ in before], [token for _, token in before]]
        self._kv[[block for block, _ in places], [token for _, token in places]] = previous * self._factors + tokens[:, None]

    def _extend(self, part: Part) -> None:
        """A run of one request's tokens: ``c[k] = f^(k+1) * (c[-1] + sum of t[j] * f^-(j+1))``."""
        work, first, count = part.work, part.computed, part.tokens
        previous = self._kv[self._place(work, first - 1)] if first else self._seed
        tokens = np.array(work.tokens[first : first + count], np.uint64)[:, None] + np.uint64(1)
        chain = self._powers[1 : count + 1] * (previous + np.cumsum(tokens * self._inverses[1 : count + 1], axis=0, dtype=np.uint64))
        positions = np.arange(first, first + count)
        blocks = np.array(work.blocks)[positions // self._block_size]
        self._kv[blocks, positions % self._block_size] = chain

    def _sample(self, work: Work) -> int:
        count, size = len(work.tokens), self._block_size
        reader, read = self._readers.get(work.request_id) or (blake3(), 0)
        if work.generated == work.max_tokens - 1:
            reader, read = blake3(), 0
        full = count // size
        if full > read:
            reader.update(self._kv[np.array(work.blocks[read:full])].tobytes())
            self._readers[work.request_id] = reader, full
        if count % size:
            reader = reader.copy()
            reader.update(self._kv[work.blocks[full], : count % size].tobytes())
        return FIRST_WORD + int.from_bytes(reader.digest()[:8], "little") % WORDS

    def _place(self, work: Work, position: int) -> tuple[int, int]:
        return work.blocks[position // self._block_size], position % self._block_size

    # The engine's blocks, for the connector's worker half.

    def computed(self) -> Computed:
        """A step has ended when ``forward`` returns."""
        return AlreadyComputed()

    def save(self, entries: Sequence[Entry], key: bytes | None) -> list[bytes]:
        """Copies blocks into their extents, at the end of the profile's time: whoever writes them meanwhile spoils the copy."""
        self._pass(self._profile.publish_seconds(self._tokens(entries)))
        digests = []
        for entry in entries:
            pages = np.frombuffer(entry.extent, np.uint8).reshape(len(entry.blocks), self.block_bytes)
            pages[:] = self._pages[entry.blocks]
            digests.append(_digest(pages, key))
        return digests

    def load(self, entries: Sequence[Entry], key: bytes | None) -> list[bytes]:
        """Copies extents into their blocks, at the end of the profile's time; what arrived is digested."""
        self._pass(self._profile.pull_seconds(self._tokens(entries)))
        digests = []
        for entry in entries:
            arrived = np.array(np.frombuffer(entry.extent, np.uint8).reshape(len(entry.blocks), self.block_bytes))
            blocks = np.array(entry.blocks)
            self._pages[blocks[blocks >= 0]] = arrived[blocks >= 0]
            arrived[blocks >= 0] = self._pages[blocks[blocks >= 0]]
            digests.append(_digest(arrived, key))
        return digests

    def digests(self, entries: Sequence[Sequence[int]], key: bytes) -> list[bytes]:
        """In no time: a GPU digests a step's chunks in less than a millisecond."""
        return [_digest(self._pages[list(blocks)], key) for blocks in entries]

    def shared(self, holder: str, layout: bytes) -> SharedMemory:
        """The blocks as other simulated engines reach them, in other processes, too."""
        return self._memory.shared(holder, layout)

    def reaches(self) -> list[str]:
        """The memory of this machine's processes."""
        return [self._memory.device]

    def fetch(self, memory: SharedMemory, entries: Sequence[Handed], key: bytes | None) -> list[bytes]:
        """Copies another engine's blocks, at the end of the profile's time."""
        self._pass(self._profile.hand_over_seconds(sum(len(entry.blocks) for entry in entries) * self._block_size))
        self._memory.fetch(memory, [(entry.there, entry.blocks) for entry in entries])
        return [_digest(self._pages[list(entry.blocks)], key) for entry in entries]

    def unmap(self, memory: SharedMemory) -> None:
        """Nothing was opened."""

    def _tokens(self, entries: Sequence[Entry]) -> int:
        return sum(block >= 0 for entry in entries for block in entry.blocks) * self._block_size

    def _pass(self, seconds: float) -> None:
        time.sleep(seconds / self._speed)


def _digest(pages: NDArray[np.uint8], key: bytes | None) -> bytes:
    return b"" if key is None else blake3(pages.data, key=key).digest()


def _powers(factors: Sequence[int], count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The factors' powers 0 to ``count`` modulo 2^64 and those powers' inverses, ``[count + 1][layers]``."""
    inverses = [_inverse(factor) for factor in factors]
    bases = [np.array(values, np.uint64) for values in (factors, inverses)]
    tables = []
    for base in bases:
        steps = np.broadcast_to(base, (count + 1, len(factors))).copy()
        steps[0] = 1
        tables.append(np.cumprod(steps, axis=0, dtype=np.uint64))
    return tables[0], tables[1]


def _inverse(odd: int) -> int:
    """The inverse modulo 2^64 by Newton's method: each round doubles the bits that are right, of which an odd number starts with three."""
    found = odd
    for _ in range(_ODD_INVERSE_ROUNDS):
        found = found * (2 - odd * found) & ((1 << 64) - 1)
    return found
