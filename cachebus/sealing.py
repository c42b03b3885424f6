"""Encryption at rest: chunks on disk and in the shared tier, AES-256-GCM with the chunk's identity as associated data.

A sealed payload is as long as the plain one; nonce and tag travel in the header. A chunk that was swapped for another, cut or changed does
not open. The key is derived from the cluster's digest key.
"""

from __future__ import annotations

import mmap
import secrets
import threading
from dataclasses import replace

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from cachebus.chunk import SEAL_BYTES, ChunkHeader
from cachebus.extents import aligned

NONCE_BYTES, TAG_BYTES = 12, 16
assert NONCE_BYTES + TAG_BYTES == SEAL_BYTES
_CONTEXT = "headstart 2026-11 encryption at rest"
_PIECE_BYTES = 1 << 20
_SPARE_BYTES = 16
"""What the cipher may write beyond what it is given."""


class Sealer:
    """Seals and opens with the key that belongs to ``digest_key``. Any thread may call; each has a buffer of its own."""

    def __init__(self, digest_key: bytes) -> None:
        self.key = blake3(digest_key, derive_key_context=_CONTEXT).digest()
        self._own = threading.local()

    def buffer(self, length: int) -> memoryview:
        """This thread's buffer: ``length`` bytes rounded up to pages, at an address that O_DIRECT takes. Good until the next call."""
        memory = getattr(self._own, "memory", None)
        if memory is None or len(memory) < length + _SPARE_BYTES:
            memory = self._own.memory = mmap.mmap(-1, aligned(length + _SPARE_BYTES))
        return memoryview(memory)[: aligned(length)]

    def seal(self, header: ChunkHeader, payload: memoryview) -> tuple[ChunkHeader, memoryview]:
        """The header to store and the sealed payload, which lies in this thread's buffer."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        sealed = replace(header, sealed=True)
        cipher = Cipher(algorithms.AES(self.key), modes.GCM(nonce)).encryptor()
        cipher.authenticate_additional_data(_identity(header))
        into = self.buffer(len(payload))
        whole = memoryview(self._own.memory)
        for start in range(0, len(payload), _PIECE_BYTES):
            piece = payload[start : start + _PIECE_BYTES]
            cipher.update_into(piece, whole[start : start + len(piece) + _SPARE_BYTES])
        cipher.finalize()
        return replace(sealed, seal=nonce + cipher.tag), into[: len(payload)]

    def open(self, header: ChunkHeader, sealed: memoryview, into: memoryview) -> bool:
        """Opens a payload; False where it is not what was sealed under this header, and then ``into`` holds rubbish."""
        nonce, tag = header.seal[:NONCE_BYTES], header.seal[NONCE_BYTES:]
        cipher = Cipher(algorithms.AES(self.key), modes.GCM(nonce, tag)).decryptor()
        cipher.authenticate_additional_data(_identity(header))
        for start in range(0, len(sealed), _PIECE_BYTES):
            piece = sealed[start : start + _PIECE_BYTES]
            if start + len(piece) + _SPARE_BYTES <= len(into):
                cipher.update_into(piece, into[start : start + len(piece) + _SPARE_BYTES])
            else:
                into[start : start + len(piece)] = cipher.update(piece)
        try:
            cipher.finalize()
        except InvalidTag:
            return False
        return True


def _identity(header: ChunkHeader) -> bytes:
    return b"".join([header.key, header.layout, header.digest, header.key_id, header.length.to_bytes(8, "little"), header.tenant])
