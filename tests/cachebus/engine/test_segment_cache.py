"""What is kept, and what goes first."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cachebus.engine.segment_cache import ENTRY_BYTES, SegmentCache


def ids(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.uint32)


def names_held(cache: SegmentCache, names: list[bytes]) -> list[bytes]:
    return [name for name, found in zip(names, cache.find(names), strict=True) if found is not None]


def test_what_was_used_longest_ago_goes() -> None:
    cache = SegmentCache(3 * (ENTRY_BYTES + 40))
    for name in (b"a", b"b", b"c"):
        cache.add(name, ids(10))
    assert names_held(cache, [b"a"]) == [b"a"]
    cache.add(b"d", ids(10))
    assert names_held(cache, [b"a", b"b", b"c", b"d"]) == [b"a", b"c", b"d"]


def test_what_alone_exceeds_the_room_is_not_kept_and_nothing_goes_for_it() -> None:
    cache = SegmentCache(ENTRY_BYTES + 40)
    cache.add(b"a", ids(10))
    cache.add(b"b", ids(11))
    assert names_held(cache, [b"a", b"b"]) == [b"a"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), max_size=60), st.integers(0, 2000))
def test_the_room_is_never_exceeded_and_ids_are_those_that_came(entries: list[tuple[int, int]], room: int) -> None:
    cache, sizes = SegmentCache(room), {}
    for name, count in entries:
        sizes.setdefault(name, count)
        # The same name has the same ids always: it is a digest of the text.
        cache.add(bytes([name]), ids(sizes[name], name))
        held = {n: found for n in sizes if (found := cache.find([bytes([n])])[0]) is not None}
        assert all(found.tolist() == ids(sizes[n], n).tolist() for n, found in held.items())
        statistics = cache.statistics()
        assert statistics == {"segments": len(held), "bytes": sum(sizes[n] * 4 + ENTRY_BYTES for n in held)}
        assert statistics["bytes"] <= room
