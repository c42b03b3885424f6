"""What buses know of what tenants took: the tables, and buses that ask each other on a network that the test makes."""

from __future__ import annotations

import pytest
from test_agreement import Network

from cachebus.agreement import EXCHANGE_MS
from cachebus.effects import Answer
from cachebus.messages_routers import Exchange, OtherLoads, Spent, TellLoads
from cachebus.spending import BEGUN_ANEW_MS, ENTRIES_MAX, SILENCE_MS_MAX, Spending


def spent(age_ms: int, requests: int = 1) -> Spent:
    return Spent(age_ms, requests, 10 * requests, requests, 0)


def test_a_router_hears_of_all_others_and_a_node_of_what_this_one_was_told() -> None:
    table = Spending()
    assert not table.wanted
    table.tell("a", {"t": spent(1)}, 0)
    table.tell("b", {}, 0)
    table.told_by_node({"c": {"t": spent(2)}}, 0)
    table.learn({"d": {"t": spent(3)}, "a": {"t": spent(0)}}, 0)
    assert table.wanted
    assert table.for_router("b") == {"a": {"t": spent(1)}, "c": {"t": spent(2)}, "d": {"t": spent(3)}}
    assert table.for_router("a") == {"c": {"t": spent(2)}, "d": {"t": spent(3)}}
    assert table.for_node(["c"]) == {"a": {"t": spent(1)}}, "what was learnt is not passed on"
    assert table.own({"t": "x"}.get) == {"x": {"a": {"t": spent(1)}}}


def test_the_later_word_counts_and_a_count_may_begin_anew() -> None:
    table = Spending()
    table.told_by_node({"c": {"t": spent(BEGUN_ANEW_MS + 5, 7)}}, 0)
    table.told_by_node({"c": {"t": spent(6, 2)}}, 1)
    assert table.for_router("a") == {"c": {"t": spent(BEGUN_ANEW_MS + 5, 7)}}
    table.told_by_node({"c": {"t": spent(4, 1)}}, 2)
    assert table.for_router("a") == {"c": {"t": spent(4, 1)}}
    table.learn({"c": {"t": spent(9, 3)}}, 3)
    assert table.for_router("a") == {"c": {"t": spent(9, 3)}}, "of two tables, too"


def test_nobody_speaks_for_a_router_of_this_node() -> None:
    table = Spending()
    table.tell("a", {"t": spent(1)}, 0)
    for take in (table.told_by_node, table.learn):
        take({"a": {"t": spent(9, 1000)}}, 1)
    assert table.for_router("b") == {"a": {"t": spent(1)}}


def test_what_nobody_says_again_is_forgotten() -> None:
    table = Spending()
    table.tell("a", {"t": spent(1)}, 0)
    table.told_by_node({"c": {"t": spent(1)}}, 100)
    table.end_silent(SILENCE_MS_MAX)
    assert table.wanted
    assert table.for_router("x") == {"a": {"t": spent(1)}, "c": {"t": spent(1)}}
    table.end_silent(SILENCE_MS_MAX + 1)
    assert not table.wanted
    assert table.for_router("x") == {"c": {"t": spent(1)}}


def test_tables_and_answers_are_bounded() -> None:
    table = Spending()
    for first in range(0, 2 * ENTRIES_MAX, 1000):
        table.told_by_node({f"r{first}": {f"t{n}": spent(1) for n in range(first, first + 1000)}}, 0)
    table.tell("a", {f"t{n}": spent(1) for n in range(100)}, 0)
    for known in (table.for_node([]), table.for_router("x")):
        assert sum(map(len, known.values())) == ENTRIES_MAX
        assert len(known["a"]) == 100, "this node's own come first"


class Telling(Network):
    """Routers that tell what their tenants took."""

    def tell(self, at: int, router: str, **tenants: Spent) -> dict[str, dict[str, Spent]]:
        (answer,) = self.agreements[at].tell(b"r", 0, TellLoads(router, {}, tenants), self.now)
        assert isinstance(answer, Answer)
        assert isinstance(answer.body, OtherLoads)
        return answer.body.spent


def tenants() -> dict[str, Spent]:
    return {f"tenant {number}": spent(number + 1) for number in range(20)}


@pytest.mark.parametrize(("count", "followers", "one", "other"), [(2, (), 0, 1), (3, (), 2, 0), (4, (2, 3), 2, 3)])
def test_what_is_told_on_one_node_is_known_on_another(count: int, followers: tuple[int, ...], one: int, other: int) -> None:
    network = Telling(count, *followers)
    network.tell(one, "a", **tenants())
    network.tell(other, "b")
    for _ in range(2):
        network.passes(EXCHANGE_MS)
    assert network.tell(other, "b") == {"a": tenants()}
    assert network.tell(one, "a", **tenants()) == {}
    assert network.agreements[0].counts()["routers"] == (1 if 0 in (one, other) else 0), "the routers of a node are its own"


def test_when_an_owner_goes_others_are_told() -> None:
    network = Telling(4, 2, 3)
    network.tell(2, "a", **tenants())
    network.cut = {frozenset({0, n}) for n in range(1, 4)}
    network.see()
    for _ in range(2 * SILENCE_MS_MAX // EXCHANGE_MS):
        network.tell(2, "a", **tenants())
        network.tell(3, "b")
        network.passes(EXCHANGE_MS)
    assert network.tell(3, "b") == {"a": tenants()}


def test_where_no_tenants_are_limited_nothing_is_sent() -> None:
    network = Telling(3)
    for at in range(3):
        network.live(at, f"r{at}")
    network.passes(EXCHANGE_MS)
    network.passes(EXCHANGE_MS)
    assert not network.sent


def test_an_exchange_that_wants_nothing_is_not_answered() -> None:
    network = Telling(1)
    assert network.agreements[0].exchange(b"n", 1, Exchange(["a"], {"a": tenants()}, False), 0.0) == []
    assert network.tell(0, "b") == {"a": tenants()}
