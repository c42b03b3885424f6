"""vLLM's own cache manager under random traffic: what its events say is what it holds, and what it would hit."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import msgspec
import pytest
import torch
from vllm.distributed.kv_events import KVEventBatch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from cachebus.engine.hbm_map import HbmMap, decode_batch
from cachebus.keys import chunk_keys, root_key

NAMESPACE = b"n" * 32
BLOCK, CHUNK, BLOCKS = 4, 16, 60


@dataclass
class Engine:
    """A scheduler's side of memory: requests take blocks, grow, end, and are evicted by others; copies of a prompt run side by side."""

    seed: int
    running: dict[str, Request] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        init_none_hash(sha256_cbor)
        self.random = random.Random(self.seed)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        config = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        self.manager = KVCacheManager(config, 4096, scheduler_block_size=BLOCK, hash_block_size=BLOCK, enable_kv_cache_events=True)

    def step(self) -> bytes:
        """One step of traffic; returns what the engine would publish, b"" for nothing."""
        action = self.random.random()
        if action < 0.45:
            self._admit()
        elif action < 0.75 and self.running:
            self._grow()
        elif action < 0.98 and self.running:
            self.manager.free(self.running.pop(self.random.choice(sorted(self.running))))
        elif action > 0.99:
            while self.running:
                self.manager.free(self.running.popitem()[1])
            assert self.manager.reset_prefix_cache()
        elif self.running:
            request = self.running[self.random.choice(sorted(self.running))]
            (blocks,) = self.manager.get_block_ids(request.request_id)
            self.manager.evict_blocks(set(self.random.sample(blocks, 1)))
        events = self.manager.take_events()
        return msgspec.msgpack.encode(KVEventBatch(ts=1.0, events=events, data_parallel_rank=0)) if events else b""

    def _admit(self) -> None:
        beginning = self.random.randrange(3)
        tokens = [beginning] * self.random.randrange(1, 60) + [self.random.randrange(3) for _ in range(self.random.randrange(40))]
        request = self.request(tokens, self.random.choice([None, None, "salt"]))
        computed, hit, _ = self.manager.get_computed_blocks(request)
        # Some look at the cache before those they run beside have filled it, so they compute the same blocks once more.
        if self.random.random() < 0.3:
            computed, hit = self.manager.empty_kv_cache_blocks, 0
        if self.manager.allocate_slots(request, len(tokens) - hit, hit, computed) is not None:
            request.num_computed_tokens = len(tokens)
            self.running[request.request_id] = request

    def _grow(self) -> None:
        request = self.running[self.random.choice(sorted(self.running))]
        request.append_output_token_ids(self.random.randrange(3))
        if self.manager.allocate_slots(request, 1) is not None:
            request.num_computed_tokens += 1

    def request(self, tokens: list[int], salt: str | None) -> Request:
        self.count += 1
        hasher = get_request_block_hasher(BLOCK, sha256_cbor)
        return Request(str(self.count), tokens, SamplingParams(max_tokens=999), None, cache_salt=salt, block_hasher=hasher)

    def hit_chunks(self, tokens: list[int], salt: str | None) -> int:
        """What vLLM would find of a prompt, in whole chunks; one more token because the last is always computed."""
        return int(self.manager.get_computed_blocks(self.request([*tokens, 0], salt))[1]) // CHUNK


@pytest.mark.parametrize("seed", range(4))
def test_the_map_equals_what_the_cache_holds_and_hits(seed: int) -> None:
    engine, hbm = Engine(seed), HbmMap(NAMESPACE, BLOCK, CHUNK)
    seen: dict[tuple[tuple[int, ...], str | None], list[bytes]] = {}
    evicted = copies = hits = 0
    for _ in range(1000):
        payload = engine.step()
        for event in decode_batch(payload) if payload else []:
            hbm.apply(event)
            evicted += event.type == "BlockRemoved"
        held = engine.manager.block_pool.cached_block_hash_to_block._cache
        assert len(hbm) == len(held), "every block's name is known as long as a block of that name is there, and no longer"
        copies += any(isinstance(blocks, dict) for blocks in held.values())
        for request in engine.running.values():
            tokens = tuple(request.all_token_ids)
            seen[tokens, request.cache_salt] = chunk_keys(root_key(NAMESPACE, request.cache_salt or ""), tokens, CHUNK)
        for (tokens, salt), keys in engine.random.choices(list(seen.items()), k=5 if seen else 0):
            known = next((n for n, key in enumerate(keys) if key not in hbm.chunks), len(keys))
            assert known == engine.hit_chunks(list(tokens), salt)
            hits += known
    assert min(evicted, copies, hits) > 100, "the traffic has to do what it is for"
