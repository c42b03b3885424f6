from hypothesis import given
from hypothesis import strategies as st

from cachebus.extents import ALIGNMENT_BYTES, Extents, aligned

PAGE = ALIGNMENT_BYTES


def test_lengths_are_rounded_up_to_pages() -> None:
    assert [aligned(n) for n in (1, PAGE, PAGE + 1)] == [PAGE, PAGE, 2 * PAGE]


def test_freed_neighbours_merge() -> None:
    extents = Extents(3 * PAGE)
    places = [extents.allocate(PAGE) for _ in range(3)]
    assert extents.allocate(1) is None
    for place in (places[0], places[2], places[1]):
        assert place is not None
        extents.release(place, PAGE)
    assert extents.allocate(3 * PAGE) == 0


def test_take_refuses_what_is_not_free() -> None:
    extents = Extents(4 * PAGE)
    assert extents.take(PAGE, PAGE)
    assert not extents.take(PAGE, PAGE)
    assert not extents.take(0, 2 * PAGE)
    assert not extents.take(3 * PAGE, 2 * PAGE)
    assert not extents.take(1, PAGE)
    assert extents.free_bytes == 3 * PAGE


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * PAGE)), max_size=60))
def test_extents_never_overlap_and_nothing_is_lost(steps: list[tuple[bool, int]]) -> None:
    extents = Extents(16 * PAGE)
    held: list[tuple[int, int]] = []
    for allocate, length in steps:
        if allocate:
            place = extents.allocate(length)
            if place is not None:
                assert all(place + aligned(length) <= a or a + aligned(n) <= place for a, n in held)
                held.append((place, length))
        elif held:
            extents.release(*held.pop(length % len(held)))
    assert extents.free_bytes == extents.size - sum(aligned(n) for _, n in held)
    for item in held:
        extents.release(*item)
    assert extents.allocate(16 * PAGE) == 0
