"""``headstart cache export``: chunks from the tiers into a file."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from cachebus.archive import ArchiveWriter, matches
from cachebus.chunk import ChunkHeader, key_id
from cachebus.errors import BusError, HeadstartError
from cachebus.messages import Acquire, Extent, Granted, Quarantine, Release
from cachebus.messages_tools import ChunkInfo, Chunks
from cachebus.table import Record, State
from deploy.cache.member import Member
from deploy.cache.progress import Progress, bytes_text
from deploy.settings import Settings

BATCH_BYTES_MAX = 64 << 20
BATCH_SHARE = 8
"""A batch is leased at one time; it may take this part of the region, so that engines find room meanwhile."""
BATCH_CHUNKS_MAX = 256
WAIT_MS = 1000
ARRIVAL_SECONDS_MAX = 10.0
_LOOK_SECONDS = 0.0005
_LOOKS_MAX = 3
_OWN_TIERS = ("dram", "nvme", "redis")


@dataclass
class _Counts:
    exported: int = 0
    gone: int = 0
    bad: int = 0
    bytes: int = 0


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Writes the file and prints a summary; 1 where a chunk failed its digest.

    Raises BusUnavailable where no cachebus answers, BusError where a prefix means no chunk, HeadstartError where the file can't be written.
    """
    member = Member(settings.cache.resolved_run_dir(os.environ), "cache export")
    try:
        listed = member.chunks()
        wanted = _wanted(listed.chunks, options.keys, options.tier)
        with _whole_or_not_at_all(options.file) as file:
            writer = ArchiveWriter(file, member.digest_key, member.welcome.chunk_size, sealed=settings.security.encrypt_at_rest)
            export = _Export(member, listed, writer, wanted)
            export.all()
    finally:
        member.close()
    return _report(export.counts, export.progress.seconds, options)


class _Export:
    def __init__(self, member: Member, listed: Chunks, writer: ArchiveWriter, wanted: list[ChunkInfo]) -> None:
        self._member, self._writer, self._wanted = member, writer, wanted
        self._layouts = listed.layouts
        # What only the shared tier has may be of any model that this node knows.
        self._known = sorted({*listed.layouts, *(chunk.layout for chunk in listed.chunks if chunk.layout)})
        self._used = {chunk.key: chunk.used_at for chunk in wanted}
        self._key_id = key_id(member.digest_key)
        self._total = sum(chunk.length for chunk in wanted) if all(chunk.length for chunk in wanted) else 0
        self.counts = _Counts()
        self.progress = Progress(self._text)

    def all(self) -> None:
        """Writes every chunk that can still be had, and the footer."""
        batch_bytes = min(BATCH_BYTES_MAX, self._member.welcome.region_bytes // BATCH_SHARE)
        for layout, chunks in groupby(self._wanted, lambda chunk: chunk.layout):
            for batch in _batches(chunks, batch_bytes):
                self._member.stay()
                keys = [chunk.key for chunk in batch]
                for tried in [layout] if layout else self._known:
                    keys = self._take(keys, tried)
                self.counts.gone += len(keys)
        self._writer.finish()
        self.progress.show(last=True)

    def _take(self, keys: list[bytes], layout: bytes) -> list[bytes]:
        """Writes these chunks; the keys of those that could not be had."""
        missed: list[bytes] = []
        while keys:
            granted = self._member.ask(Acquire(self._member.holder, layout, keys, WAIT_MS), Granted)
            try:
                missed += [extent.key for extent in granted.extents if not self._write(extent, layout)]
            finally:
                if granted.lease:
                    self._member.tell(Release([granted.lease]))
            if not granted.extents:
                missed.append(keys[0])
            keys = keys[max(1, len(granted.extents)) :]
        return missed

    def _write(self, extent: Extent, layout: bytes) -> bool:
        """Writes one leased chunk; False where it did not come up. One that fails its digest is counted and reported, not written."""
        record = self._arrived(extent)
        if record is None:
            return False
        shape, dtype = self._layouts.get(layout, ("", ""))
        used_at = self._used.get(extent.key, 0)
        known = (extent.key, layout, extent.digest, extent.length, self._key_id, record.tenant, used_at)
        header = ChunkHeader(*known, shape, dtype, expires_at=record.expires_at)
        with self._member.region.data[extent.offset : extent.offset + extent.length] as payload:
            if matches(payload, header, self._member.digest_key):
                self._writer.add(header, payload)
                self.counts.exported += 1
                self.counts.bytes += extent.length
            else:
                self.counts.bad += 1
                self._member.tell(Quarantine(extent.key, extent.digest))
        self.progress.show()
        return True

    def _arrived(self, extent: Extent) -> Record | None:
        """The chunk's record once its bytes are in DRAM; None where they don't come."""
        deadline = time.monotonic() + ARRIVAL_SECONDS_MAX
        unreadable = 0
        while time.monotonic() < deadline and unreadable < _LOOKS_MAX:
            record = self._member.region.table.record(extent.slot)
            if record is None or record.generation != extent.generation:
                # The daemon may be writing it just now.
                unreadable += 1
            elif record.state == State.COMMITTED or (extent.ready and record.state == State.DOOMED):
                return record
            elif record.state == State.DOOMED:
                return None
            time.sleep(_LOOK_SECONDS)
        return None

    def _text(self, seconds: float) -> str:
        return f"{self.counts.exported} of {len(self._wanted)} chunks, {bytes_text(seconds, self.counts.bytes, self._total)}"


def _wanted(chunks: list[ChunkInfo], prefixes: list[str] | None, tier: str | None) -> list[ChunkInfo]:
    """The chunks asked for, in the order in which an importing node is to use them: last used last, a prompt's beginning after its end."""
    found = [chunk for chunk in chunks if (tier in chunk.tiers if tier else any(own in chunk.tiers for own in _OWN_TIERS))]
    if prefixes is not None:
        begins = tuple(prefix.lower() for prefix in prefixes)
        for prefix in begins:
            if not any(chunk.key.hex().startswith(prefix) for chunk in found):
                raise BusError(f"{prefix!r} is the beginning of no chunk's key; `headstart cache ls --limit 0` shows them all")
        found = [chunk for chunk in found if chunk.key.hex().startswith(begins)]
    found.reverse()
    return sorted(found, key=lambda chunk: (chunk.used_at, chunk.layout))


def _batches(chunks: Iterator[ChunkInfo], bytes_max: int) -> Iterator[list[ChunkInfo]]:
    batch: list[ChunkInfo] = []
    for chunk in chunks:
        # One whose length is not known is taken for a large one.
        if batch and (len(batch) == BATCH_CHUNKS_MAX or sum(c.length or bytes_max // 8 for c in (*batch, chunk)) > bytes_max):
            yield batch
            batch = []
        batch.append(chunk)
    if batch:
        yield batch


@contextlib.contextmanager
def _whole_or_not_at_all(path: Path) -> Iterator[BinaryIO]:
    """A file that only its owner may read, which gets its name when it is whole; otherwise nothing stays. Raises HeadstartError."""
    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise HeadstartError(f"can't write {part}: {error.strerror or error}; nothing of it was kept") from error


def _report(counts: _Counts, seconds: float, options: argparse.Namespace) -> int:
    if options.json:
        print(json.dumps({**vars(counts), "seconds": round(seconds, 3), "file": str(options.file)}))
    else:
        print(f"exported {counts.exported} chunks, {counts.bytes / 1e9:.3f} GB, in {seconds:.1f} s to {options.file}")
        if counts.gone:
            print(f"{counts.gone} chunks were gone when their turn came")
        if counts.bad:
            print(f"{counts.bad} chunks did not match their digest: left out, and nobody is served them any more")
    return 1 if counts.bad else 0
