"""A chunk outside the region: the header that goes before its bytes on disk and in the shared tier.

The header says what the bytes are (key, layout, length, shape, element type) and carries their keyed digest, so that whoever reads them
needs no other index to know whether they are whole and whether they are the right ones.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

from blake3 import blake3

HEADER_BYTES = 256
"""Length of a packed header."""

TENANT_BYTES = 8
DIGEST_KEY_ID_BYTES = 8
_MAGIC = b"HSCHUNK1"
_VERSION = 1
_SHAPE_BYTES, _DTYPE_BYTES = 64, 16
SEAL_BYTES = 28
_HEADER = struct.Struct(f"<8sI32s16s32s{DIGEST_KEY_ID_BYTES}sQQ{TENANT_BYTES}s{_SHAPE_BYTES}s{_DTYPE_BYTES}sB{SEAL_BYTES}sQ")
_CHECKSUM = struct.Struct("<I")
assert _HEADER.size + _CHECKSUM.size <= HEADER_BYTES

Taken = Callable[[memoryview], object]
"""What a reader calls with each piece of a chunk's payload once it is there, in order."""


@dataclass(frozen=True)
class ChunkHeader:
    """What a chunk is. ``length`` is bytes of payload, ``digest`` is keyed BLAKE3-256 of it, times are seconds since 1970 (``expires_at`` 0: never).

    ``shape`` and ``dtype`` are for people and say what ``layout`` (16 bytes) stands for; ``tenant`` (8 bytes) is derived from the
    cache_salt, ``key_id`` (8 bytes) from the digest key. ``sealed``: the stored payload is encrypted; ``seal`` (28 bytes) opens it with the key.
    """

    key: bytes
    layout: bytes
    digest: bytes
    length: int
    key_id: bytes
    tenant: bytes = bytes(TENANT_BYTES)
    written_at: int = 0
    shape: str = ""
    dtype: str = ""
    sealed: bool = False
    seal: bytes = bytes(SEAL_BYTES)
    expires_at: int = 0


def key_id(digest_key: bytes) -> bytes:
    """Names a digest key without telling it: chunks digested under another key can't be checked, so they are foreign."""
    return blake3(b"headstart digest key id", key=digest_key).digest()[:DIGEST_KEY_ID_BYTES]


def pack_header(header: ChunkHeader) -> bytes:
    """The header as ``HEADER_BYTES`` bytes. Every byte of it is covered by its checksum."""
    packed = _HEADER.pack(
        _MAGIC,
        _VERSION,
        header.key,
        header.layout,
        header.digest,
        header.key_id,
        header.length,
        header.written_at,
        header.tenant,
        header.shape.encode()[:_SHAPE_BYTES],
        header.dtype.encode()[:_DTYPE_BYTES],
        header.sealed,
        header.seal,
        header.expires_at,
    )
    body = packed.ljust(HEADER_BYTES - _CHECKSUM.size, b"\0")
    return body + _CHECKSUM.pack(crc32(body))


def unpack_header(packed: bytes) -> ChunkHeader | None:
    """The header in the first ``HEADER_BYTES`` of ``packed``; None where they are not a whole header of this version."""
    body = packed[: HEADER_BYTES - _CHECKSUM.size]
    if len(packed) < HEADER_BYTES or _CHECKSUM.unpack_from(packed, HEADER_BYTES - _CHECKSUM.size) != (crc32(body),):
        return None
    magic, version, key, layout, digest, digest_key_id, length, written_at, tenant, shape, dtype, sealed, seal, expires = _HEADER.unpack_from(body)
    if magic != _MAGIC or version != _VERSION:
        return None
    return ChunkHeader(key, layout, digest, length, digest_key_id, tenant, written_at, _text(shape), _text(dtype), bool(sealed), seal, expires)


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode("utf-8", "replace")
