"""The listing of a directory's chunks, page by page."""

from __future__ import annotations

import pytest
from directory_node import Node, key

from cachebus import census
from cachebus.effects import Held
from cachebus.messages_tools import ChunkInfo

IN_DRAM, IN_REDIS, AT_A_PEER = {1, 2, 5, 8}, {2, 3, 4, 5, 9}, {5, 6, 7, 8, 10}
ALL = IN_DRAM | IN_REDIS | AT_A_PEER


@pytest.fixture
def node() -> Node:
    made = Node()
    made.store(*IN_DRAM)
    made.directory.tiers.learn(Held("redis", {key(n) for n in IN_REDIS}, whole=True))
    made.directory.tiers.learn(Held("peer", {key(n) for n in AT_A_PEER}, whole=True, peer="other"))
    return made


def pages(node: Node, count_max: int) -> list[list[ChunkInfo]]:
    found = []
    after, more = b"", True
    while more:
        page = census.chunks(node.directory, after, count_max)
        assert not page.chunks or page.chunks[0].key > after
        found.append(page.chunks)
        after, more = page.chunks[-1].key, page.more
    return found


@pytest.mark.parametrize("count_max", range(1, len(ALL) + 2))
def test_pages_of_any_size_hold_every_chunk_once_with_all_its_tiers(node: Node, count_max: int) -> None:
    found = pages(node, count_max)
    assert [len(page) for page in found[:-1]] == [count_max] * (len(found) - 1)
    assert len(found) == -(-len(ALL) // count_max), "the last page knows that it is the last"
    chunks = [chunk for page in found for chunk in page]
    assert [chunk.key for chunk in chunks] == [key(n) for n in sorted(ALL)]
    for number, chunk in zip(sorted(ALL), chunks, strict=True):
        tiers = [name for name, held in (("dram", IN_DRAM), ("redis", IN_REDIS), ("peer", AT_A_PEER)) if number in held]
        assert chunk.tiers == tiers
        assert bool(chunk.length) == (number in IN_DRAM)


def test_a_chunk_that_goes_between_two_pages_breaks_nothing(node: Node) -> None:
    first = census.chunks(node.directory, b"", 3)
    node.directory.tiers.learn(Held("redis", {key(n) for n in IN_REDIS - {3, 4}}, whole=True))
    rest = census.chunks(node.directory, first.chunks[-1].key, 100)
    assert [chunk.key for chunk in [*first.chunks, *rest.chunks]] == [key(n) for n in sorted(ALL - {4})]
    assert not rest.more


def test_a_directory_without_chunks_has_one_empty_page() -> None:
    page = census.chunks(Node().directory, b"", 10)
    assert (page.chunks, page.more) == ([], False)
