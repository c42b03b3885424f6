"""The map from vLLM's blocks to chunks, beside a model that knows the set of blocks and counts anew each time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from engine_events import CLEARED, Version, packed, removed, stored
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cachebus.engine import hbm_map
from cachebus.engine.hbm_map import HbmMap, decode_batch
from cachebus.errors import BusError
from cachebus.keys import chunk_keys, root_key

NAMESPACE = b"n" * 32
BLOCK, CHUNK = 2, 6
TOKENS = list(range(100, 118))


def names(tokens: list[int], salt: str = "") -> list[bytes]:
    return [f"{salt}/{tokens[:end]}".encode() for end in range(BLOCK, len(tokens) + 1, BLOCK)]


def keys(tokens: list[int], salt: str = "") -> list[bytes]:
    return chunk_keys(root_key(NAMESPACE, salt), tokens, CHUNK)


def run_of(tokens: list[int], first: int = 0, last: int | None = None, salt: str = "", version: Version = "0.32.0", **more: Any) -> dict[str, Any]:
    """Blocks ``first`` to ``last`` (excluded) of a prompt."""
    called = names(tokens, salt)
    last = len(called) if last is None else last
    extras = [[salt] if salt and number == 0 else None for number in range(first, last)]
    parent = called[first - 1] if first else None
    return stored(called[first:last], parent, tokens[first * BLOCK : last * BLOCK], BLOCK, extras if any(extras) else None, version, **more)


def mapped(*events: dict[str, Any]) -> HbmMap:
    hbm = HbmMap(NAMESPACE, BLOCK, CHUNK)
    feed(hbm, *events)
    return hbm


def feed(hbm: HbmMap, *events: dict[str, Any]) -> None:
    for event in decode_batch(packed(*events)):
        hbm.apply(event)


class Blocks(RuleBasedStateMachine):
    """Blocks of a few prompts that share beginnings, stored in any order and number, and removed in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.hbm = HbmMap(NAMESPACE, BLOCK, CHUNK)
        self.there: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self.told: set[bytes] = set()

    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=7).map(lambda bits: [token for bit in bits for token in (7, bit)])
    salts = st.sampled_from(["", "", "salt"])

    @rule(tokens=prompts, salt=salts, data=st.data(), version=st.sampled_from(["0.25.1", "0.32.0"]))
    def store(self, tokens: list[int], salt: str, data: st.DataObject, version: Version) -> None:
        first = data.draw(st.integers(0, len(tokens) // BLOCK - 1))
        feed(self.hbm, run_of(tokens, first, salt=salt, version=version))
        self.there.update((salt, tuple(tokens[:end])) for end in range((first + 1) * BLOCK, len(tokens) + 1, BLOCK))

    @rule(data=st.data(), count=st.integers(1, 4))
    def remove(self, data: st.DataObject, count: int) -> None:
        for _ in range(min(count, len(self.there))):
            salt, tokens = block = data.draw(st.sampled_from(sorted(self.there)))
            feed(self.hbm, removed([names(list(tokens), salt)[-1]]))
            self.there -= Counter([block])
            if not self.there:
                return

    @rule()
    def remove_what_nobody_knows(self) -> None:
        feed(self.hbm, removed([b"unknown"]))

    @rule()
    def clear(self) -> None:
        feed(self.hbm, CLEARED)
        self.there.clear()

    @rule()
    def tell(self) -> None:
        fresh, gone = self.hbm.changes()
        assert not set(fresh) & self.told
        assert set(gone) <= self.told
        self.told = (self.told | set(fresh)) - set(gone)
        assert self.told == self.hbm.chunks

    @invariant()
    def chunks_are_those_that_a_prompt_could_hit(self) -> None:
        whole = {
            (salt, tokens)
            for salt, tokens in self.there
            if len(tokens) % CHUNK == 0 and all((salt, tokens[:end]) in self.there for end in range(BLOCK, len(tokens), BLOCK))
        }
        assert self.hbm.chunks == {keys(list(tokens), salt)[-1] for salt, tokens in whole}
        assert len(self.hbm) == len(self.there)
        if not self.there:
            assert not self.hbm._orphans


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("version", ["0.25.1", "0.32.0"])
@pytest.mark.parametrize("salt", ["", "tenant"])
def test_both_versions_events_give_the_keys_that_routers_and_connectors_use(version: Version, salt: str) -> None:
    assert mapped(run_of(TOKENS, salt=salt, version=version)).chunks == set(keys(TOKENS, salt))


def test_a_chunk_is_there_from_its_last_block_on_and_gone_with_any() -> None:
    hbm = mapped(run_of(TOKENS, 0, 5))
    assert hbm.chunks == set(keys(TOKENS)[:1])
    feed(hbm, run_of(TOKENS, 5, 9))
    assert hbm.chunks == set(keys(TOKENS))
    feed(hbm, removed([names(TOKENS)[4]]))
    assert hbm.chunks == set(keys(TOKENS)[:1]), "what follows a missing block can't be hit"
    feed(hbm, run_of(TOKENS, 4, 5))
    assert hbm.chunks == set(keys(TOKENS))


def test_a_block_held_twice_goes_with_its_second_removal() -> None:
    hbm = mapped(run_of(TOKENS), run_of(TOKENS, 0, 1))
    feed(hbm, removed(names(TOKENS)[:1]))
    assert hbm.chunks == set(keys(TOKENS))
    feed(hbm, removed(names(TOKENS)[:1]))
    assert hbm.chunks == set()


def test_what_came_and_went_between_two_reports_is_not_told() -> None:
    hbm = mapped(run_of(TOKENS))
    assert [set(part) for part in hbm.changes()] == [set(keys(TOKENS)), set()]
    feed(hbm, CLEARED, run_of(TOKENS, 0, 3))
    assert [set(part) for part in hbm.changes()] == [set(), set(keys(TOKENS)[1:])]
    hbm.forget_told()
    assert hbm.changes() == (keys(TOKENS)[:1], [])


@pytest.mark.parametrize(
    "event",
    [
        run_of(TOKENS, lora_id=1, lora_name="a"),
        run_of(TOKENS, lora_name="a"),
        run_of(TOKENS, medium="CPU"),
        run_of(TOKENS, group_idx=1),
        run_of(TOKENS) | {"block_size": 1},
        stored(names(TOKENS), None, TOKENS, BLOCK, [[["image", 0]], *[None] * 8]),
        stored(names(TOKENS), None, TOKENS, BLOCK, [["salt", ["image", 0]], *[None] * 8]),
        stored(names(TOKENS), None, TOKENS, BLOCK, [[b"embeddings"]] * 9),
        {"type": "BlockOfAnotherKind", "block_hashes": [b"x"], "new": 1},
    ],
)
def test_what_has_no_key_here_is_passed_over(event: dict[str, Any]) -> None:
    hbm = mapped(event)
    assert (hbm.chunks, len(hbm)) == (set(), 0)
    feed(hbm, run_of(TOKENS))
    assert hbm.chunks == set(keys(TOKENS))


def test_text_before_an_image_still_counts() -> None:
    hbm = mapped(stored(names(TOKENS), None, TOKENS, BLOCK, [*[None] * 4, [["image", 1]], *[None] * 4]))
    assert hbm.chunks == set(keys(TOKENS)[:1])


def test_removals_elsewhere_are_not_ours() -> None:
    hbm = mapped(run_of(TOKENS), removed(names(TOKENS), medium="CPU"), removed(names(TOKENS), group_idx=2))
    assert hbm.chunks == set(keys(TOKENS))


def test_short_names_work_too() -> None:
    hbm = mapped(stored([1, 2, 3], None, TOKENS[:6], BLOCK), stored([4, 5, 6], 3, TOKENS[6:12], BLOCK))
    assert hbm.chunks == set(keys(TOKENS[:12]))
    feed(hbm, removed([5]))
    assert hbm.chunks == set(keys(TOKENS[:6]))


@pytest.mark.parametrize(
    "event",
    [
        stored(names(TOKENS), None, TOKENS[1:], BLOCK),
        stored(names(TOKENS), None, [-1, *TOKENS[1:]], BLOCK),
        stored(names(TOKENS), None, [1 << 40, *TOKENS[1:]], BLOCK),
    ],
)
def test_what_can_not_be_is_an_error(event: dict[str, Any]) -> None:
    with pytest.raises(BusError):
        mapped(event)


@pytest.mark.parametrize("payload", [b"", b"\xc1", packed(stored(["text"], None, [1], 1)), packed({"no": "type"}), packed(run_of(TOKENS))[:-9]])
def test_what_does_not_decode_is_an_error(payload: bytes) -> None:
    with pytest.raises(BusError, match="does not decode"):
        decode_batch(payload)


def test_an_engine_that_names_too_much_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbm_map, "BLOCKS_MAX", 9)
    hbm = mapped(run_of(TOKENS))
    with pytest.raises(BusError, match="more than 9"):
        feed(hbm, run_of([1, *TOKENS[1:]], 0, 1))


def test_a_block_that_claims_to_follow_itself_is_no_loop() -> None:
    hbm = mapped(stored([b"a"], b"a", [1, 2], BLOCK), stored([b"b"], b"c", [1, 2], BLOCK), stored([b"c"], b"b", [1, 2], BLOCK))
    feed(hbm, removed([b"a", b"b", b"c"]))
    assert (hbm.chunks, len(hbm)) == (set(), 0)


def test_a_chunk_has_to_be_whole_blocks() -> None:
    with pytest.raises(ValueError, match="whole number"):
        HbmMap(NAMESPACE, 100, 256)
