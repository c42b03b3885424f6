"""The control of the twin runs: bytes that are wrong must show. With the check they are caught, without it they change tokens."""

from __future__ import annotations

from typing import Any

import pytest
from live import Live
from tests_shared import wait_for

from cachebus.keys import chunk_keys, root_key
from cachebus.region import Region
from deploy.client import ask

pytestmark = pytest.mark.engine

TOKENS = 1000


def spoil(live: Live, prompt: str) -> None:
    """Flips the sign of every number of one block of one layer of the prompt's second chunk."""
    worker = live.snapshot().workers[0]
    ids = live.prompts.token_ids(prompt)
    wanted = chunk_keys(root_key(worker.namespace), ids, worker.chunk_size)[1]
    region = Region.map(live.settings.cache.resolved_region_path({}))
    (record,) = [record for _, record in region.table.read() if record.key == wanted]
    page = record.length // (2 * 8)
    for place in range(record.offset + 3, record.offset + page, 4):
        region.data[place] ^= 0x80
    region.close()


@pytest.fixture
def unchecked(live: Live) -> Any:
    """A decode worker that does not check digests, asked directly."""
    name = "decode-unchecked"
    live.cluster.launch(name, "--name", name, "--set", "security.verify_digests=false")
    wait_for(lambda: name in live.workers(), 120)
    yield live.workers()[name]
    process = live.cluster.processes.pop(name)
    process.terminate()
    assert process.wait(60) == 0
    wait_for(lambda: name not in live.workers())


def test_a_flipped_block_is_caught_and_computed_again(live: Live) -> None:
    prompt = live.prompts.text(TOKENS)
    body = live.body(prompt)
    expected = live.plains(body).token_ids
    live.ours(body)
    live.empty_hbm()
    failures = live.statistics()["integrity_failures_total"]
    spoil(live, prompt)
    answer = live.ours(body)
    assert answer.token_ids == expected
    assert int(answer.headers["x-headstart-cached-tokens"]) == 256, "the good chunk before it still counts"
    assert live.statistics()["integrity_failures_total"] == failures + 1
    live.empty_hbm()
    repaired = live.ours(body)
    assert repaired.token_ids == expected
    assert int(repaired.headers["x-headstart-cached-tokens"]) >= 768, "what was computed again is in the store again"
    assert live.statistics()["integrity_failures_total"] == failures + 1


def test_the_first_chunk_may_be_the_bad_one(live: Live) -> None:
    """The case in which vLLM asks again for the same prefix: answering it alike would loop for ever."""
    prompt = live.prompts.text(300)
    body = live.body(prompt)
    expected = live.plains(body).token_ids
    live.ours(body)
    live.empty_hbm()
    region = Region.map(live.settings.cache.resolved_region_path({}))
    for _, record in region.table.read():
        region.data[record.offset] ^= 1
    region.close()
    assert live.ours(body).token_ids == expected


def test_without_the_check_the_same_flip_changes_the_tokens(live: Live, unchecked: str) -> None:
    prompt = live.prompts.text(TOKENS)
    body = live.body(prompt)
    expected = live.plains(body).token_ids
    live.ours(body)
    assert ask(unchecked, "/v1/completions", body).token_ids == expected, "untouched bytes must give the right tokens"
    live.empty_hbm()
    spoil(live, prompt)
    assert ask(unchecked, "/v1/completions", body).token_ids != expected
