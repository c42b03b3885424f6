"""A file of chunks, by which a warm cache is carried to another node.

    HEADSTART-CACHE 1 {"chunk_size": ..., ...} <seal of this line, hex>\\n
    header (256 bytes, cachebus.chunk)  its seal (32 bytes)  payload        once a chunk
    HSCHEND1  number of chunks (8 bytes)  its seal (32 bytes)

A seal is keyed BLAKE3 over the line, the chunk's number and the header, under a key that belongs to the digest key: a header's own checksum shows
an accident, but only the seal shows that somebody put one chunk's key before another's bytes. The payload is covered by the digest in its header.
"""

from __future__ import annotations

import io
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import BinaryIO

from blake3 import blake3

from cachebus.chunk import HEADER_BYTES, ChunkHeader, key_id, pack_header, unpack_header
from cachebus.errors import ArchiveError
from cachebus.sealing import Sealer

VERSION = 1
SEAL_BYTES = 32
LINE_BYTES_MAX = 4096
_MAGIC = b"HEADSTART-CACHE"
_END = b"HSCHEND1"
_COUNT_BYTES = 8
_CONTEXT = "headstart 2026-11 file of chunks"
_SKIP_BYTES = 1 << 20


@dataclass(frozen=True)
class About:
    """What the first line says. ``key_id``: of the digest key, in hex; ``chunk_size``: tokens in a chunk; ``made_at``: seconds since 1970.

    ``sealed``: payloads are encrypted (cachebus.sealing). ``id`` is random: a chunk of one file is no chunk of another.
    """

    key_id: str
    chunk_size: int
    sealed: bool = False
    made_at: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: secrets.token_hex(8))


class _Seals:
    def __init__(self, digest_key: bytes, line: bytes) -> None:
        self._key = blake3(digest_key, derive_key_context=_CONTEXT).digest()
        self.of_line = blake3(line, key=self._key).digest()

    def of(self, number: int, head: bytes) -> bytes:
        return blake3(self.of_line + number.to_bytes(8, "little") + head, key=self._key).digest()


def matches(payload: memoryview, header: ChunkHeader, digest_key: bytes) -> bool:
    """Whether a plain payload is the one that the header speaks of."""
    return len(payload) == header.length and blake3(payload, key=digest_key).digest() == header.digest


class ArchiveWriter:
    """Writes chunks into ``file``, one after another; without ``finish`` the file counts as cut. Raises OSError where it can't be written."""

    def __init__(self, file: BinaryIO, digest_key: bytes, chunk_size: int, *, sealed: bool = False) -> None:
        self._file = file
        self._sealer = Sealer(digest_key) if sealed else None
        self._key_id = key_id(digest_key)
        line = b" ".join([_MAGIC, str(VERSION).encode(), json.dumps(asdict(About(self._key_id.hex(), chunk_size, sealed))).encode()])
        self._seals = _Seals(digest_key, line)
        self._file.write(line + b" " + self._seals.of_line.hex().encode() + b"\n")
        self.count = 0

    def add(self, header: ChunkHeader, payload: memoryview) -> None:
        """Writes one chunk; its payload is plain and was checked."""
        if self._sealer:
            header, payload = self._sealer.seal(header, payload)
        packed = pack_header(header)
        self._file.write(packed + self._seals.of(self.count, packed))
        self._file.write(payload)
        self.count += 1

    def finish(self) -> None:
        """Writes the footer."""
        end = _END + self.count.to_bytes(_COUNT_BYTES, "little")
        self._file.write(end + self._seals.of(self.count, end))


class ArchiveReader:
    """Reads such a file from its beginning; a pipe will do.

    Raises ArchiveError where it is none, of another version, damaged in its first line, or of a cluster with another digest key.
    """

    def __init__(self, file: io.BufferedIOBase, digest_key: bytes) -> None:
        self._file = file
        self._digest_key = digest_key
        line = file.readline(LINE_BYTES_MAX)
        self.about = _about(line)
        if self.about.key_id != key_id(digest_key).hex():
            raise ArchiveError(
                f"the file's chunks are digested under the key {self.about.key_id}, this node has {key_id(digest_key).hex()}, so they can't be "
                "checked here: give both nodes one security.digest_key_file (or security.keys_dir of one cluster)"
            )
        text, _, seal = line.rstrip(b"\n").rpartition(b" ")
        self._seals = _Seals(digest_key, text)
        if not line.endswith(b"\n") or seal != self._seals.of_line.hex().encode():
            raise ArchiveError("the file's first line is damaged")
        self._sealer = Sealer(digest_key) if self.about.sealed else None
        self.count = 0
        self.bytes_read = len(line)

    def headers(self) -> Iterator[ChunkHeader]:
        """Every chunk's header; ``take`` or ``skip`` its payload before the next. Raises ArchiveError where the file is cut or damaged."""
        while True:
            magic = self._exactly(len(_END))
            if magic == _END:
                return self._end(magic)
            packed = magic + self._exactly(HEADER_BYTES - len(magic))
            seal = self._exactly(SEAL_BYTES)
            header = unpack_header(packed)
            if header is None or seal != self._seals.of(self.count, packed) or header.sealed != self.about.sealed:
                # Its length can't be believed either, so nobody knows where the next chunk begins.
                raise ArchiveError(f"the header of chunk {self.count + 1} is damaged: what comes after it can't be read")
            yield header
            self.count += 1

    def take(self, header: ChunkHeader, into: memoryview) -> bool:
        """Reads the payload into ``into`` (``header.length`` bytes), plain; False where it is not what its header says: then it is rubbish."""
        if self._sealer is None:
            self._fill(into)
        else:
            sealed = self._sealer.buffer(header.length)[: header.length]
            self._fill(sealed)
            if not self._sealer.open(header, sealed, into):
                return False
        return matches(into, header, self._digest_key)

    def skip(self, header: ChunkHeader) -> None:
        """Passes over the payload, unchecked."""
        left = header.length
        if self._file.seekable():
            # A cut within it is noticed by whoever reads on.
            self._file.seek(left, io.SEEK_CUR)
            self.bytes_read += left
            return
        while left:
            left -= len(self._exactly(min(left, _SKIP_BYTES)))

    def _end(self, magic: bytes) -> None:
        count = self._exactly(_COUNT_BYTES)
        if self._exactly(SEAL_BYTES) != self._seals.of(self.count, magic + count) or int.from_bytes(count, "little") != self.count:
            raise ArchiveError(f"the file's end is damaged: it does not vouch for {self.count} chunks")
        if self._file.read(1):
            raise ArchiveError("the file goes on after its end")

    def _exactly(self, length: int) -> bytes:
        found = self._file.read(length)
        self.bytes_read += len(found)
        if len(found) < length:
            raise self._cut()
        return found

    def _fill(self, into: memoryview) -> None:
        filled = 0
        while filled < len(into):
            got = self._file.readinto(into[filled:])
            if not got:
                raise self._cut()
            filled += got
            self.bytes_read += got

    def _cut(self) -> ArchiveError:
        return ArchiveError(f"the file is cut: it ends at chunk {self.count + 1}, without the footer")


def _about(line: bytes) -> About:
    parts = line.split(b" ", 2)
    if len(parts) != 3 or parts[0] != _MAGIC:
        raise ArchiveError("the file is none that `headstart cache export` wrote")
    if parts[1] != str(VERSION).encode():
        raise ArchiveError(f"the file has version {parts[1][:20].decode(errors='replace')}, and this Headstart reads version {VERSION}")
    try:
        found, _ = json.JSONDecoder().raw_decode(parts[2].decode())
        return About(**found)
    except (ValueError, TypeError) as error:
        raise ArchiveError("the file's first line is damaged") from error
