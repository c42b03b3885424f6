from __future__ import annotations

import pytest

from cachebus.chunk import HEADER_BYTES, ChunkHeader, key_id, pack_header, unpack_header

HEADER = ChunkHeader(
    key=bytes(range(32)),
    layout=b"l" * 16,
    digest=b"d" * 32,
    length=1 << 20,
    key_id=key_id(b"k" * 32),
    tenant=b"t" * 8,
    written_at=1_790_000_000,
    shape="8 x (2, 1, 128, 64)",
    dtype="torch.float32",
    sealed=True,
)


def test_a_header_comes_back() -> None:
    packed = pack_header(HEADER)
    assert len(packed) == HEADER_BYTES
    assert unpack_header(packed) == HEADER
    assert unpack_header(packed + b"payload") == HEADER


@pytest.mark.parametrize("place", range(HEADER_BYTES))
def test_every_byte_of_it_counts(place: int) -> None:
    packed = bytearray(pack_header(HEADER))
    for bit in range(8):
        packed[place] ^= 1 << bit
        assert unpack_header(bytes(packed)) is None
        packed[place] ^= 1 << bit


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1])
def test_a_torn_header_is_none(length: int) -> None:
    assert unpack_header(pack_header(HEADER)[:length]) is None


def test_another_digest_key_has_another_name() -> None:
    assert key_id(b"a" * 32) != key_id(b"b" * 32)
