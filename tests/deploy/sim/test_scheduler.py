"""The simulated engine's scheduler and its blocks, without time and without a bus."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from cachebus.engine.hbm_map import HbmMap, decode_batch
from cachebus.keys import chunk_keys, root_key
from deploy.sim.kv_events import KvEvents
from deploy.sim.profile import Profile
from deploy.sim.scheduler import Scheduler, Step, Work

BLOCK = 4
NAMESPACE = b"n" * 32


class Cache:
    """A connector that finds what a test says."""

    def __init__(self) -> None:
        self.found: dict[str, int | None] = {}
        self.loads: list[tuple[str, list[int], int]] = []
        self.ended: list[str] = []
        self.kept: set[str] = set()

    def matched(self, request_id: str, local_tokens: int, now_ms: float, free_blocks: int) -> int | None:
        found = self.found.get(request_id, 0)
        return None if found is None else max(0, found - local_tokens)

    def allocated(self, request_id: str, blocks: Sequence[int], external_tokens: int) -> None:
        if external_tokens:
            self.loads.append((request_id, list(blocks), external_tokens))

    def loaded(self, request_ids: Sequence[str]) -> None:
        pass

    def finished(self, request_id: str, *, whole: bool = False) -> bool:
        self.ended.append(request_id)
        return whole and request_id in self.kept


class Engine:
    """A scheduler and what drives it."""

    def __init__(self, blocks: int = 16, batched: int = 16, seqs: int = 4) -> None:
        self.cache = Cache()
        self.events = KvEvents(BLOCK)
        profile = Profile(blocks=blocks, block_size=BLOCK, max_model_len=blocks, max_num_batched_tokens=batched, max_num_seqs=seqs)
        self.scheduler = Scheduler(profile, self.cache, self.events)
        self.works: dict[str, Work] = {}

    def add(self, name: str, tokens: int | list[int], count: int = 1) -> Work:
        given = tokens if isinstance(tokens, list) else [ord(name[0]) * 1000 + n for n in range(tokens)]
        self.works[name] = Work(name, given, count)
        self.scheduler.add(self.works[name])
        return self.works[name]

    def step(self) -> dict[str, tuple[int, int]]:
        """One step; what each request computed in it: from where, how many tokens."""
        step = self.scheduler.schedule(0)
        self.done(step)
        return {part.work.request_id: (part.computed, part.tokens) for part in step.parts}

    def done(self, step: Step) -> None:
        self.scheduler.advance(step, [len(part.work.tokens) if part.samples else None for part in step.parts])
        self.scheduler.check_integrity()


def test_a_long_prompt_is_computed_in_parts_and_others_generate_beside_it() -> None:
    engine = Engine()
    engine.add("a", 3, 10)
    assert engine.step() == {"a": (0, 3)}
    engine.add("b", 33, 2)
    engine.add("c", 2)
    assert engine.step() == {"a": (3, 1), "b": (0, 15)}
    assert engine.step() == {"a": (4, 1), "b": (15, 15)}
    assert engine.step() == {"a": (5, 1), "b": (30, 3), "c": (0, 2)}
    assert engine.step() == {"a": (6, 1), "b": (33, 1)}
    assert engine.cache.ended == ["c", "b"]


def test_no_more_run_at_once_than_allowed() -> None:
    engine = Engine(seqs=2)
    for name in "abc":
        engine.add(name, 2, 2)
    assert engine.step() == {"a": (0, 2), "b": (0, 2)}
    assert (engine.scheduler.running, engine.scheduler.waiting) == (2, 1)
    engine.step()
    assert engine.step() == {"c": (0, 2)}


def test_blocks_in_hbm_are_used_again_but_never_for_the_last_token() -> None:
    engine = Engine()
    engine.add("a", 8)
    engine.step()
    engine.add("b", engine.works["a"].tokens[:8])
    assert engine.step() == {"b": (4, 4)}
    engine.add("c", [*engine.works["a"].tokens[:8], 1, 2])
    assert engine.step() == {"c": (8, 2)}
    assert engine.works["c"].cached_tokens == 8
    other = Work("d", engine.works["a"].tokens[:8], 1, salt="another tenant")
    engine.works["d"] = other
    engine.scheduler.add(other)
    assert engine.step() == {"d": (0, 8)}


def test_the_blocks_let_go_longest_ago_are_taken_first_and_a_prompts_end_before_its_beginning() -> None:
    engine = Engine(blocks=4)
    engine.add("a", 8)
    engine.step()
    engine.add("b", 8)
    engine.step()
    engine.add("c", 4)
    engine.step()
    engine.add("a", 8)
    assert engine.step() == {"a": (4, 4)}, "its end went for c, its beginning is still there"


def test_a_pull_holds_blocks_and_what_did_not_come_is_computed() -> None:
    engine = Engine()
    engine.cache.found["a"] = None
    engine.add("a", 14, 4)
    engine.add("b", 1)
    assert engine.step() == {"b": (0, 1)}, "a lookup is not waited for"
    engine.cache.found["a"] = 14
    assert engine.step() == {}
    ((name, blocks, tokens),) = engine.cache.loads
    assert (name, len(blocks), tokens) == ("a", 4, 14)
    assert engine.scheduler.loading
    engine.scheduler.load_finished("a", ())
    assert engine.step() == {"a": (13, 1)}, "the last token is computed again"
    engine.add("d", 14)
    engine.cache.found["d"] = 14
    engine.step()
    engine.scheduler.load_finished("d", [engine.cache.loads[1][1][2]])
    assert engine.works["d"].cached_tokens == 8
    assert engine.step() == {"a": (15, 1), "d": (8, 6)}


def test_out_of_blocks_the_last_one_starts_again_and_all_end() -> None:
    engine = Engine(blocks=6)
    engine.add("a", 8, 12)
    engine.add("b", 8, 12)
    seen = []
    while len(engine.cache.ended) < 2:
        step = engine.scheduler.schedule(0)
        seen += step.preempted
        engine.done(step)
    assert seen == ["b"]
    assert [work.generated for work in engine.works.values()] == [12, 12]
    assert engine.scheduler.pool.free == 6


def test_whoever_leaves_gives_its_blocks_back_after_its_pull() -> None:
    engine = Engine()
    engine.add("a", 8, 5)
    engine.step()
    engine.cache.found["b"] = 8
    engine.add("b", 9, 5)
    engine.add("c", 100)
    engine.step()
    for name in ("a", "b", "c", "b", "nobody"):
        engine.scheduler.abort(name)
    assert engine.cache.ended == ["a", "b", "c"]
    assert engine.scheduler.pool.free == 14, "a pull still writes b's blocks"
    engine.scheduler.load_finished("b", ())
    assert engine.scheduler.pool.free == 16
    assert not engine.scheduler.waiting
    assert engine.step() == {}


def test_pulled_prefixes_that_hold_each_others_blocks_do_not_stop_the_engine() -> None:
    engine = Engine(blocks=6)
    for name in "ab":
        engine.cache.found[name] = 8
        engine.add(name, 18)
    engine.step()
    for name in "ab":
        engine.scheduler.load_finished(name, ())
    # The second pull left too few blocks for either to go on.
    engine.cache.found = {}
    for _ in range(20):
        engine.step()
    assert sorted(engine.cache.ended) == ["a", "b"]


def test_the_events_of_blocks_tell_what_a_prompt_would_hit() -> None:
    """Held against the map that a real engine's supervisor makes of its events."""
    engine, hbm, chance = Engine(blocks=24), HbmMap(NAMESPACE, BLOCK, 2 * BLOCK), random.Random(3)
    prompts = [[family, *(family * 50 + n for n in range(chance.randint(2, 30)))] for family in (1, 2, 3) for _ in range(4)]
    for number in range(200):
        prompt, salt = chance.choice(prompts), chance.choice(["", "", "a tenant's"])
        engine.scheduler.add(Work(f"r{number}", list(prompt), chance.randint(1, 9), salt))
        for _ in range(30):
            engine.step()
        batch = engine.events.batch(0)
        for event in decode_batch(batch) if batch else ():
            hbm.apply(event)
        for tokens, tenant in itertools.product(prompts, ("", "a tenant's")):
            names = chunk_keys(root_key(b"", tenant), tokens, BLOCK)
            keys = chunk_keys(root_key(NAMESPACE, tenant), tokens, 2 * BLOCK)
            known = sum(1 for _ in itertools.takewhile(hbm.chunks.__contains__, keys))
            assert known == len(engine.scheduler.pool.known(names)) // 2
    assert hbm.chunks
    assert engine.events.batch(0) is None


@pytest.mark.parametrize("seed", range(30))
def test_whatever_comes_everything_ends_and_no_block_is_lost(seed: int) -> None:
    chance = random.Random(seed)
    engine = Engine(blocks=chance.randint(8, 20), batched=chance.randint(1, 24), seqs=chance.randint(1, 5))
    room = len(engine.scheduler.pool._holders) * BLOCK
    aborted: set[str] = set()
    for number in range(60):
        name = f"{'abc'[number % 3]}{number}"
        prompt = chance.randint(1, min(30, room - 6))
        engine.add(name, prompt, chance.randint(1, 6))
        engine.cache.found[name] = chance.choice([0, 0, None, prompt // BLOCK * BLOCK, prompt])
    for _ in range(3000):
        _one_turn(engine, chance, aborted)
        if len(engine.cache.ended) == 60:
            break
    assert sorted(engine.cache.ended) == sorted(engine.works)
    while engine.cache.loads:
        engine.scheduler.load_finished(engine.cache.loads.pop()[0], ())
    assert engine.scheduler.pool.free == len(engine.scheduler.pool._holders)
    assert all(work.generated == work.max_tokens for name, work in engine.works.items() if name not in aborted)


def _one_turn(engine: Engine, chance: random.Random, aborted: set[str]) -> None:
    engine.step()
    for name, found in engine.cache.found.items():
        if found is None and chance.random() < 0.3:
            engine.cache.found[name] = 0
    if engine.cache.loads and chance.random() < 0.5:
        name, blocks, _ = engine.cache.loads.pop(0)
        engine.scheduler.load_finished(name, chance.choice([(), blocks[-1:], blocks[:1]]))
    if chance.random() < 0.05:
        name = chance.choice(list(engine.works))
        if name not in engine.cache.ended:
            aborted.add(name)
            engine.scheduler.abort(name)
    engine.scheduler.check_integrity()
