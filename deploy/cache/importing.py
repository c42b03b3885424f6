"""``headstart cache import``: an exported file's chunks into DRAM, as an engine would put them there."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cachebus.archive import ArchiveReader
from cachebus.chunk import ChunkHeader
from cachebus.errors import ArchiveError, HeadstartError
from cachebus.messages import Abandon, Acquire, Commit, Granted, NewEntry, Release, Reserve, Reserved, Slot, Stat, StatReply, WrittenEntry
from deploy.cache.member import Member
from deploy.cache.progress import Progress, bytes_text
from deploy.settings import Settings

ROOM_SECONDS_MAX = 30.0
"""How long nothing may be written behind before the import no longer waits for it."""
_LOOK_SECONDS = 0.05
_HERE = ("dram", "nvme", "redis")


@dataclass
class _Counts:
    imported: int = 0
    already_there: int = 0
    bad: int = 0
    no_room: int = 0
    bytes: int = 0
    evicted_again: int = 0


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Takes the file in and prints a summary; 1 where any of it was bad or found no room, 130 where a person ended it.

    Raises BusUnavailable where no cachebus answers, ArchiveError where the file is none for this node, HeadstartError where it can't be read.
    """
    try:
        with options.file.open("rb") as file:
            member = Member(settings.cache.resolved_run_dir(os.environ), "cache import")
            try:
                reader = ArchiveReader(file, member.digest_key)
                _check_chunk_size(reader, member)
                bringer = _Import(member, reader, options.file, int(settings.cache.write_behind_gb_max * 1e9))
                ended, problem = _outcome(bringer)
            finally:
                member.close()
    except OSError as error:
        raise HeadstartError(f"can't read {options.file}: {error.strerror or error}") from error
    return _report(bringer, ended, problem, options)


def _outcome(bringer: _Import) -> tuple[bool, str]:
    """Runs it: whether a person ended it, and what is wrong with the file as a whole."""
    ended, problem = False, ""
    try:
        bringer.all()
    except ArchiveError as error:
        problem = str(error)
    except KeyboardInterrupt:
        ended, problem = True, "ended before the file's end"
    bringer.progress.clear()
    bringer.count_evicted()
    return ended, problem


class _Import:
    def __init__(self, member: Member, reader: ArchiveReader, path: Path, write_behind_bytes_max: int) -> None:
        self._member, self._reader = member, reader
        known = os.stat(path)
        self._file_bytes = known.st_size if stat.S_ISREG(known.st_mode) else 0
        self._there = {chunk.key: chunk.layout for chunk in member.chunks().chunks if any(tier in chunk.tiers for tier in _HERE)}
        self._new: set[bytes] = set()
        self._waiting_max = write_behind_bytes_max // 2
        self._pace_bytes = max(1, min(write_behind_bytes_max, member.welcome.region_bytes) // 4)
        self._since_pace = 0
        self.counts = _Counts()
        self.progress = Progress(self._text)

    def all(self) -> None:
        """Takes every chunk in. Raises ArchiveError where the file is cut or damaged; what came before stays."""
        for header in self._reader.headers():
            if self._there.get(header.key, None) in (header.layout, b""):
                self.counts.already_there += 1
                self._reader.skip(header)
            else:
                self._bring(header)
            self.progress.show()
        self.progress.show(last=True)

    def count_evicted(self) -> None:
        """Counts what was imported and is in no tier any more."""
        left = {chunk.key for chunk in self._member.chunks().chunks}
        self.counts.evicted_again = len(self._new - left)

    def _bring(self, header: ChunkHeader) -> None:
        self._keep_pace(header.length)
        slot = self._room(header)
        if slot is None:
            self._reader.skip(header)
            return
        name = (slot.slot, slot.generation)
        good = False
        try:
            with self._member.region.data[slot.offset : slot.offset + header.length] as into:
                good = self._reader.take(header, into)
        finally:
            if not good:
                self._member.tell(Abandon(self._member.holder, [name]))
        if not good:
            self.counts.bad += 1
            return
        self._member.tell(Commit(self._member.holder, [WrittenEntry(*name, header.digest)]))
        self._there[header.key] = header.layout
        self._new.add(header.key)
        self.counts.imported += 1
        self.counts.bytes += header.length

    def _room(self, header: ChunkHeader) -> Slot | None:
        """An extent for the chunk; None, and counted, where somebody was quicker or there is no room."""
        entry = NewEntry(header.key, header.length, tenant=header.tenant, expires_at=header.expires_at)
        asked = Reserve(self._member.holder, header.layout, [entry])
        found: list[Slot] = []

        def decided() -> bool:
            found.extend(self._member.ask(asked, Reserved).slots)
            return bool(found) or self._came_meanwhile(header)

        # What waits to be written behind can't be evicted yet.
        if decided() or self._wait(decided):
            if found:
                return found[0]
            self.counts.already_there += 1
        else:
            self.counts.no_room += 1
        return None

    def _came_meanwhile(self, header: ChunkHeader) -> bool:
        granted = self._member.ask(Acquire(self._member.holder, header.layout, [header.key], 0), Granted)
        if granted.lease:
            self._member.tell(Release([granted.lease]))
        return bool(granted.lease)

    def _keep_pace(self, length: int) -> None:
        """Goes no faster than the tiers below take what is committed: DRAM would drop it unwritten."""
        self._since_pace += length
        if self._since_pace >= self._pace_bytes:
            self._since_pace = 0
            self._member.stay()
            self._wait(lambda: self._waiting_bytes() <= self._waiting_max)

    def _wait(self, condition: Callable[[], bool]) -> bool:
        """Waits for the condition as long as anything is still being written behind; whether it came true."""
        least, deadline = float("inf"), time.monotonic() + ROOM_SECONDS_MAX
        while time.monotonic() < deadline:
            waiting = self._waiting_bytes()
            if condition():
                return True
            if not waiting:
                return False
            if waiting < least:
                least, deadline = waiting, time.monotonic() + ROOM_SECONDS_MAX
            self.progress.show()
            time.sleep(_LOOK_SECONDS)
        return False

    def _waiting_bytes(self) -> float:
        return self._member.ask(Stat(), StatReply).values["write_behind_bytes"]

    def _text(self, seconds: float) -> str:
        counts = self.counts
        return f"{counts.imported} chunks imported, {counts.already_there} there, {bytes_text(seconds, self._reader.bytes_read, self._file_bytes)}"


def _check_chunk_size(reader: ArchiveReader, member: Member) -> None:
    theirs, ours = reader.about.chunk_size, member.welcome.chunk_size
    if theirs != ours:
        raise ArchiveError(f"the file's chunks have {theirs} tokens, and cache.chunk_size is {ours} here: no prompt would find them")


def _report(bringer: _Import, ended: bool, problem: str, options: argparse.Namespace) -> int:
    counts, seconds = bringer.counts, bringer.progress.seconds
    if options.json:
        print(json.dumps({**vars(counts), "seconds": round(seconds, 3), "complete": not problem, "problem": problem}))
    else:
        print(
            f"imported {counts.imported} chunks, {counts.bytes / 1e9:.3f} GB, in {seconds:.1f} s; {counts.already_there} already there, "
            f"{counts.bad} refused as bad, {counts.no_room} without room"
        )
        if counts.evicted_again:
            print(f"{counts.evicted_again} of them were evicted again: the tiers hold less than what came in")
    if problem:
        print(f"headstart: {options.file}: {problem}", file=sys.stderr)
    if ended:
        return 130
    return 1 if problem or counts.bad or counts.no_room else 0
