"""A file of chunks: what was written comes back, and whatever was changed, swapped or cut is noticed."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import pytest
from blake3 import blake3
from tests_shared import DIGEST_KEY, LAYOUT

from cachebus import archive
from cachebus.archive import ArchiveReader, ArchiveWriter
from cachebus.chunk import HEADER_BYTES, ChunkHeader, key_id, pack_header
from cachebus.errors import ArchiveError

CANARY = b"the canary that nobody may read "
LENGTH = 160


def payload(number: int) -> bytes:
    return CANARY + random.Random(number).randbytes(LENGTH - len(CANARY))


def header(number: int) -> ChunkHeader:
    digest = blake3(payload(number), key=DIGEST_KEY).digest()
    return ChunkHeader(
        bytes([number]) * 32, LAYOUT, digest, LENGTH, key_id(DIGEST_KEY), b"tenant%02d" % number, 1_700_000_000, "2 x (2, 16)", "float16"
    )


def written(*numbers: int, sealed: bool = False) -> bytes:
    file = io.BytesIO()
    writer = ArchiveWriter(file, DIGEST_KEY, 256, sealed=sealed)
    for number in numbers:
        writer.add(header(number), memoryview(payload(number)))
    writer.finish()
    return file.getvalue()


def taken(raw: bytes, digest_key: bytes = DIGEST_KEY) -> tuple[list[tuple[ChunkHeader, bytes]], int, str]:
    """The chunks that an import would take, how many it would refuse, and what ended it early."""
    found, bad = [], 0
    try:
        reader = ArchiveReader(io.BytesIO(raw), digest_key)
        for head in reader.headers():
            into = bytearray(head.length)
            if reader.take(head, memoryview(into)):
                found.append((replace(head, sealed=False, seal=bytes(28)), bytes(into)))
            else:
                bad += 1
    except ArchiveError as error:
        return found, bad, str(error)
    return found, bad, ""


def record_start(raw: bytes, number: int) -> int:
    """Where the number-th chunk begins."""
    return raw.index(b"\n") + 1 + number * (HEADER_BYTES + archive.SEAL_BYTES + LENGTH)


@pytest.mark.parametrize("sealed", [False, True])
def test_what_was_written_comes_back(sealed: bool) -> None:
    raw = written(1, 2, 3, sealed=sealed)
    assert taken(raw) == ([(header(n), payload(n)) for n in (1, 2, 3)], 0, "")
    assert (CANARY in raw) is not sealed
    assert taken(written(sealed=sealed)) == ([], 0, "")


@pytest.mark.parametrize("sealed", [False, True])
def test_every_flipped_byte_is_noticed_and_nothing_wrong_is_taken(sealed: bool) -> None:
    raw = written(1, 2, sealed=sealed)
    right = {n: (header(n), payload(n)) for n in (1, 2)}
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1 << (place % 8)
        found, bad, problem = taken(bytes(changed))
        assert bad or problem, f"byte {place} was changed and nobody noticed"
        assert all(chunk in right.values() for chunk in found), f"byte {place}"


def test_without_the_check_a_flipped_byte_would_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = bytearray(written(1))
    raw[record_start(bytes(raw), 0) + HEADER_BYTES + archive.SEAL_BYTES + 50] ^= 1
    assert taken(bytes(raw)) == ([], 1, "")
    monkeypatch.setattr(archive, "matches", lambda *_: True)
    ((_, wrong),), bad, problem = taken(bytes(raw))
    assert (bad, problem) == (0, "")
    assert wrong != payload(1)


def test_a_chunk_that_was_given_anothers_key_is_noticed_though_its_checksum_is_right() -> None:
    raw = bytearray(written(1, 2))
    start = record_start(bytes(raw), 1)
    raw[start : start + HEADER_BYTES] = pack_header(replace(header(2), key=b"v" * 32))
    found, _, problem = taken(bytes(raw))
    assert [head.key for head, _ in found] == [header(1).key]
    assert "the header of chunk 2 is damaged" in problem


def test_chunks_that_changed_places_or_files_are_noticed() -> None:
    raw = written(1, 2)
    first, second, end = (record_start(raw, n) for n in range(3))
    assert taken(raw[:first] + raw[second:end] + raw[first:second] + raw[end:])[0] == []
    other = written(1, 2)
    assert taken(raw[:second] + other[second:end] + raw[end:])[2].startswith("the header of chunk 2 is damaged")
    assert "does not vouch for 1 chunks" in taken(raw[:second] + raw[end:])[2]


def test_every_cut_is_noticed() -> None:
    raw = written(1, 2)
    for length in range(len(raw)):
        assert taken(raw[:length])[2], f"cut to {length} bytes"
    assert "the file is cut" in taken(raw[:-1])[2]
    assert "goes on after its end" in taken(raw + b"x")[2]


def test_another_cluster_and_another_version_are_told_apart() -> None:
    raw = written(1)
    found, _, problem = taken(raw, b"o" * 32)
    assert found == []
    assert f"digested under the key {key_id(DIGEST_KEY).hex()}, this node has {key_id(b'o' * 32).hex()}" in problem
    assert "security.digest_key_file" in problem
    assert "version 2, and this Headstart reads version 1" in taken(raw.replace(b"CACHE 1", b"CACHE 2"))[2]
    assert "none that `headstart cache export` wrote" in taken(b"PK\x03\x04" + raw)[2]


def test_a_payload_is_passed_over_in_files_and_in_pipes() -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    for kind in (io.BytesIO, Pipe):
        reader = ArchiveReader(kind(written(1, 2)), DIGEST_KEY)
        seen = []
        for head in reader.headers():
            reader.skip(head)
            seen.append(head.key)
        assert seen == [header(1).key, header(2).key]
        with pytest.raises(ArchiveError, match="cut"):
            for head in (reader := ArchiveReader(kind(written(1)[:-100]), DIGEST_KEY)).headers():
                reader.skip(head)
