"""What every tier promises, asked of each of them in the same words: what was put comes back byte for byte, or is a miss."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests_shared import wait_for
from tier_forms import FORMS, Form, texts

from cachebus.lanes import Digesting
from cachebus.sealing import Sealer
from cachebus.zeromq_peers import PIECE_BYTES

LENGTH = 100_000
PAGE = 4096
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, PIECE_BYTES + PAGE + 1)
READERS = 8


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Form]:
    form = FORMS[request.param](tmp_path)
    yield form
    wait_for(lambda: form.statistics()["leases"] == form.statistics()["promoting"] == form.statistics()["write_behind_bytes"] == 0)
    for bus in form.stop():
        bus.daemon._directory.check_integrity()
        # What is lent to another node ends by time.
        assert len(bus.daemon._directory.leases()) == bus.daemon.statistics()["lent"]
        assert not bus.daemon._directory.tiers.held()


def test_what_was_put_comes_back_byte_for_byte(form: Form) -> None:
    for number, length in enumerate(LENGTHS):
        form.put(number, length=length)
        assert form.get(number) == [(texts(number, length=length)[0], form.source)]
        assert form.get(number) == [(texts(number, length=length)[0], "dram")]
    assert form.statistics()[form.integrity] == 0


def test_what_was_never_put_is_a_miss(form: Form) -> None:
    form.put(1, 2, length=LENGTH)
    assert form.get(9) == []
    assert [text for text, _ in form.get(1, 9, 2)] == texts(1, length=LENGTH), "a prefix ends where something is missing"


def test_the_first_that_was_put_under_a_key_stays(form: Form) -> None:
    form.put(1, length=LENGTH)
    taken = form.put_again(1, bytes(LENGTH))
    assert taken is (form.source != "dram")
    form.drop()
    assert form.get(1) == [(texts(1, length=LENGTH)[0], form.source)]


def test_another_layout_is_a_miss(form: Form) -> None:
    form.put(1, length=LENGTH)
    assert form.get(1, layout=b"m" * 16) == []
    assert form.get(1) == [(texts(1, length=LENGTH)[0], form.source)]


def changed_bytes_are_a_miss(form: Form) -> None:
    form.put(1, 2, length=LENGTH)
    form.change(2, LENGTH)
    assert form.get(1, 2) == [(texts(1, length=LENGTH)[0], form.source)]
    assert form.statistics()[form.integrity] == 1
    wait_for(lambda: form.forgotten(2))
    assert [text for text, _ in form.get(1, 2)] == texts(1, length=LENGTH), "it is not asked for again"
    assert form.statistics()[form.integrity] == 1


def test_changed_bytes_are_a_miss_and_can_be_put_again(form: Form) -> None:
    changed_bytes_are_a_miss(form)
    if form.source != "peer":
        form.put(2, length=LENGTH)
        assert form.get(2) == [(texts(2, length=LENGTH)[0], form.source)]
    else:
        # The other node has its wrong copy still; this one computes the chunk and keeps it.
        assert form.put_again(2, texts(2, length=LENGTH)[0])
        assert form.get(2) == [(texts(2, length=LENGTH)[0], "dram")]


@pytest.mark.parametrize("name", FORMS)
def test_without_the_digest_changed_bytes_would_be_served(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the one above. What is sealed is guarded twice."""
    monkeypatch.setattr(Digesting, "gives", lambda digesting, digest: True)
    monkeypatch.setattr(Form, "get", lambda form, *numbers, get=Form.get: get(form, *numbers, check=False))
    form = FORMS[name](tmp_path)
    try:
        if "sealed" in name:
            changed_bytes_are_a_miss(form)
            monkeypatch.setattr(Sealer, "open", opened_without_its_tag)
            form.put(3, length=LENGTH)
            form.change(3, LENGTH)
            assert [text == texts(3, length=LENGTH)[0] for text, _ in form.get(3)] == [False]
        else:
            with pytest.raises(AssertionError):
                changed_bytes_are_a_miss(form)
    finally:
        form.stop()


def opened_without_its_tag(sealer: Sealer, header: object, sealed: memoryview, into: memoryview) -> bool:
    into[: len(sealed)] = sealed
    return True


def test_no_more_is_held_than_allowed(form: Form) -> None:
    length = 600_001
    for number in range(30):
        form.put(number, length=length)
        held, allowed = form.bytes_held()
        assert held <= allowed
    found = [form.get(number) for number in range(30)]
    assert all(not chunks or chunks[0][0] == texts(number, length=length)[0] for number, chunks in enumerate(found))
    assert 1 <= sum(map(bool, found)) < 30, "some had to go, or were not taken"


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_tenant_over_its_share_loses_its_own(form: Form, share: float) -> None:
    """With a share of all, the control, others lose theirs, or nothing more is taken where nothing is evicted."""
    length, others = 300_001, (100, 101, 102)
    form.share({b"tenant-a": share})
    for number in others:
        form.put(number, length=length, tenant=b"tenant-b")
    for number in range(40):
        form.put(number, length=length, tenant=b"tenant-a")
    mine = [number for number in range(40) if form.get(number)]
    theirs = [number for number in others if form.get(number)]
    if share == 1.0:
        assert len(theirs) < len(others) or 39 not in mine
        return
    assert theirs == [*others]
    assert mine == [*range(40)][-len(mine) :], "the newest are left"
    assert 3 <= len(mine) <= share * form.bytes_held()[1] / length


def test_many_who_ask_at_once_bring_a_chunk_up_once(form: Form) -> None:
    length = 1 << 20
    form.put(1, length=length)
    start = threading.Barrier(READERS)
    found: list[list[tuple[bytes, str]]] = []

    def read() -> None:
        start.wait()
        found.append(form.get(1))

    readers = [threading.Thread(target=read) for _ in range(READERS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [[text for text, _ in chunks] for chunks in found] == [texts(1, length=length)] * READERS
    assert {source for chunks in found for _, source in chunks} <= {form.source, "dram"}
    if form.source != "dram":
        assert form.statistics()[f"{form.source}_promoted_total"] == 1
