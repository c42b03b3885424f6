"""What another node may read, and until when."""

import pytest

from cachebus.journal import BATCHES_MAX, Journal
from cachebus.lending import LOAN_MS, Lending
from cachebus.messages_peers import Lent, LentChunk


def lent(lending: Lending) -> Lent:
    return lending.lend(7, [LentChunk(b"b" * 32, 8192, 5000, b""), LentChunk(b"a" * 32, 0, 4096, b"")], now_ms=0)


@pytest.mark.parametrize(
    ("offset", "length", "allowed"),
    [
        (0, 4096, True),
        (0, 4097, False),
        (4000, 96, True),
        (4096, 1, False),
        (8191, 1, False),
        (8192, 5000, True),
        (8192, 5001, False),
        (8192, 0, False),
        (1 << 40, 1, False),
    ],
)
def test_a_token_opens_the_chunks_and_nothing_else(offset: int, length: int, allowed: bool) -> None:
    lending = Lending()
    loan = lent(lending)
    assert lending.may_read(7, loan.token, offset, length) is allowed
    assert not lending.may_read(7, bytes(16), offset, length)
    assert not lending.may_read(8, loan.token, offset, length)


def test_a_loan_ends_by_time() -> None:
    lending = Lending()
    loan = lent(lending)
    assert lending.ended(LOAN_MS - 1) == []
    assert lending.ended(LOAN_MS) == [7]
    assert not lending.may_read(7, loan.token, 0, 1)
    assert lending.ended(LOAN_MS) == []


def test_nothing_is_lent_of_nothing() -> None:
    lending = Lending()
    assert lending.lend(0, [], 0) == Lent(0, b"", [])
    assert len(lending) == 0


def test_a_journal_tells_what_was_missed_or_that_it_is_too_old() -> None:
    journal = Journal()
    assert journal.since(0) == []
    for seq in range(1, BATCHES_MAX + 11):
        journal.append(seq, b"%d" % seq)
    last = BATCHES_MAX + 10
    assert journal.since(last) == []
    assert journal.since(last - 2) == [b"%d" % (last - 1), b"%d" % last]
    assert len(journal.since(10) or []) == BATCHES_MAX
    assert journal.since(9) is None
    assert journal.since(last + 1) is None


def test_a_journal_has_a_size() -> None:
    journal = Journal()
    for seq in range(1, 40):
        journal.append(seq, bytes(1 << 20))
    assert journal.since(39 - 16) is not None
    assert journal.since(39 - 17) is None
