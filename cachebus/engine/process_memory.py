"""Blocks in another process's memory, on a processor: read with ``process_vm_readv(2)``, straight into this engine's own.

What a GPU's memory is to engines that share it, the machine's is to engines on a processor. The kernel lets a process read another one of the same
user; where Yama restricts that to descendants, an engine that offers its blocks allows it to all.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cachebus.errors import HandoverError
from cachebus.messages_handover import SharedMemory

_PIECES_MAX = 1024
"""The kernel's UIO_MAXIOV: parts of one call."""

_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)
_ID_BYTES = 16


class _Piece(ctypes.Structure):
    """struct iovec"""

    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


_PIECES = ctypes.POINTER(_Piece)


@dataclass(frozen=True)
class Pages:
    """Where an engine's ``count`` blocks lie: of each layer the address of block 0, ``page_bytes`` every ``stride_bytes``."""

    layers: Sequence[int]
    count: int
    stride_bytes: int
    page_bytes: int

    def of(self, blocks: Sequence[int]) -> Iterator[int]:
        """The addresses of the blocks' pages, layer by layer."""
        return (address + block * self.stride_bytes for address in self.layers for block in blocks)


class ProcessMemory:
    """This engine's blocks, and those of other processes copied into them."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        # A process id means something only within its namespace, and that only until the machine starts anew.
        self.device = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.process_vm_readv.restype = ctypes.c_ssize_t
        self._libc.process_vm_readv.argtypes = [ctypes.c_int, _PIECES, ctypes.c_ulong, _PIECES, ctypes.c_ulong, ctypes.c_ulong]

    def shared(self, holder: str, layout: bytes) -> SharedMemory:
        """These blocks as other processes reach them, which are let in from now on."""
        # Refused where there is no Yama, which then restricts nothing.
        self._libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
        own, process = self._pages, str(os.getpid()).encode()
        layers = [(process, address) for address in own.layers]
        return SharedMemory(secrets.token_bytes(_ID_BYTES), holder, layout, self.device, layers, own.count, own.stride_bytes, own.page_bytes)

    def fetch(self, memory: SharedMemory, entries: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Copies each entry's blocks there into its blocks here. Raises HandoverError."""
        own = self._pages
        if len(memory.layers) != len(own.layers) or memory.page_bytes != own.page_bytes:
            raise HandoverError(f"{len(memory.layers)} layers of {memory.page_bytes} bytes a block lie otherwise than those here")
        memory.check(block for there, _ in entries for block in there)
        theirs = Pages([address for _, address in memory.layers], memory.count, memory.stride_bytes, memory.page_bytes)
        pairs = ((source, target) for there, here in entries for source, target in zip(theirs.of(there), own.of(here), strict=True))
        while some := list(islice(pairs, _PIECES_MAX)):
            self._read(int(memory.layers[0][0]), some)

    def _read(self, process: int, pairs: Sequence[tuple[int, int]]) -> None:
        length, count = self._pages.page_bytes, len(pairs)
        sources = (_Piece * count)(*(_Piece(source, length) for source, _ in pairs))
        targets = (_Piece * count)(*(_Piece(target, length) for _, target in pairs))
        read = self._libc.process_vm_readv(process, targets, count, sources, count, 0)
        if read != length * count:
            reason = os.strerror(ctypes.get_errno()) if read < 0 else f"{read} of {length * count} bytes"
            raise HandoverError(f"the memory of process {process} can't be read: {reason}")
