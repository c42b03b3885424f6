"""Whose a prompt is among several daemons: state machines on a network that the test makes, which loses, cuts and delays what it is told to."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachebus.agreement import ANSWER_MS_MAX, EXCHANGE_MS, Agreement
from cachebus.claims import CLAIMS_MAX, ELSEWHERE_KEYS_MAX, ELSEWHERE_MAX, SILENCE_MS_MAX, Claims
from cachebus.effects import Answer, Effect
from cachebus.errors import BusError
from cachebus.messages import Denied, Done, Reply, Request
from cachebus.messages_routers import Claim, Claimed, EndClaim, Exchange, TellLoads
from cachebus.metrics import BusMetrics


def keys(*numbers: int) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in numbers]


class Network:
    """Daemons "0", "1", ...; what one asks another is done at once, unless it is cut off (nothing is sent) or deaf (nothing is answered)."""

    def __init__(self, count: int, *followers: int) -> None:
        self.now = 0.0
        self.cut: set[frozenset[int]] = set()
        self.deaf: set[int] = set()
        self.sent: Counter[str] = Counter()
        self.agreements = [Agreement(b"" if n in followers else bytes([n]) * 8, self._asks(n)) for n in range(count)]
        self.answers: dict[tuple[int, int], Reply] = {}
        self.coming: list[tuple[int, str, Answer]] = []
        self.see()

    def see(self) -> None:
        """Every daemon knows who is heard."""
        for number, agreement in enumerate(self.agreements):
            agreement.live({str(n): other.node for n, other in enumerate(self.agreements) if other.node and n != number and self._joined(number, n)})

    def claim(self, at: int, router: str, number: int, run: list[bytes], prompt: bytes = b"") -> Claimed | None:
        """The daemon's answer; None where it has not answered yet."""
        ticket = 1000 * number + at
        self._do(at, self.agreements[at].claim(b"r", ticket, Claim(router, number, run, 1.0, prompt), self.now, elsewhere=False))
        return self.answered(at, number)

    def answered(self, at: int, number: int) -> Claimed | None:
        reply = self.answers.pop((at, 1000 * number + at), None)
        assert reply is None or isinstance(reply, Claimed)
        return reply

    def end(self, at: int, router: str, number: int) -> None:
        self.agreements[at].end(EndClaim(router, number), elsewhere=False)

    def live(self, at: int, router: str) -> None:
        self.agreements[at].tell(b"r", 0, TellLoads(router, {}), self.now)

    def passes(self, ms: float) -> None:
        self.now += ms
        for at, agreement in enumerate(self.agreements):
            self._do(at, agreement.tick(self.now))
            agreement.end_silent(self.now)

    def claims(self, at: int) -> int:
        return self.agreements[at].counts()["claims"]

    def _joined(self, one: int, other: int) -> bool:
        return frozenset({one, other}) not in self.cut

    def _asks(self, asker: int):  # type: ignore[no-untyped-def]
        def ask(peer: str, number: int, request: Request) -> bool:
            other = int(peer)
            if not self._joined(asker, other):
                return False
            self.sent[type(request).__name__] += 1
            if other in self.deaf:
                return True
            it = self.agreements[other]
            found: list[Effect] = []
            if isinstance(request, Claim):
                found = it.claim(b"n", number, request, self.now, elsewhere=True)
            elif isinstance(request, EndClaim):
                found = it.end(request, elsewhere=True)
            elif isinstance(request, Exchange):
                found = it.exchange(b"n", number, request, self.now)
            for effect in found:
                assert isinstance(effect, Answer)
                self.coming.append((asker, peer, effect))
            return True

        return ask

    def _do(self, at: int, effects: list[Effect]) -> None:
        for effect in effects:
            assert isinstance(effect, Answer)
            self.answers[at, effect.ticket] = effect.body
        coming, self.coming = self.coming, []
        for asker, peer, answer in coming:
            self._do(asker, self.agreements[asker].heard(peer, answer.ticket, answer.body, self.now))


def test_all_find_the_same_owner_and_nobody_has_much_more_than_the_others() -> None:
    network = Network(4, 3)
    names = keys(*range(3000))
    shares: Counter[int] = Counter()
    for name in names:
        found = {n if (peer := agreement.owner(name)) is None else int(peer) for n, agreement in enumerate(network.agreements)}
        assert len(found) == 1
        shares[found.pop()] += 1
    assert set(shares) == {0, 1, 2}, "a router's own bus keeps nothing for others"
    assert all(800 < count < 1200 for count in shares.values())


def test_when_one_goes_only_what_it_had_moves() -> None:
    network = Network(3)
    names = keys(*range(500))
    before = {name: network.agreements[0].owner(name) for name in names}
    network.agreements[0].live({"1": network.agreements[1].node})
    after = {name: network.agreements[0].owner(name) for name in names}
    assert all(after[name] == owner for name, owner in before.items() if owner != "2")
    assert "2" not in after.values()


@pytest.mark.parametrize("number", range(8))
def test_the_first_has_it_on_whichever_node_it_is_kept(number: int) -> None:
    network = Network(3)
    run = keys(*range(number, number + 4))
    assert network.claim(0, "a", 1, run) == Claimed(True)
    for at in (1, 2, 0):
        assert network.claim(at, f"r{at}", 1, run) == Claimed(False, 4, 1.0)
    network.end(0, "a", 1)
    assert network.claim(1, "r1", 2, run) == Claimed(True)
    network.end(1, "r1", 2)
    assert [network.claims(at) for at in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("number", range(8))
def test_a_prompt_of_which_more_is_stored_by_now_is_asked_for_at_the_same_place(number: int) -> None:
    network = Network(3)
    prompt, *rest = keys(*range(10 * number, 10 * number + 6))
    assert network.claim(0, "a", 1, [prompt, *rest], prompt) == Claimed(True)
    assert network.claim(1, "b", 1, rest[2:], prompt) == Claimed(False, 3, 1.0)


def test_a_node_alone_sends_nothing() -> None:
    network = Network(1)
    assert network.claim(0, "a", 1, keys(1)) == Claimed(True)
    network.end(0, "a", 1)
    network.passes(10 * EXCHANGE_MS)
    assert not network.sent


def test_routers_buses_that_no_node_knows_agree_through_the_nodes() -> None:
    network = Network(4, 2, 3)
    for number in range(6):
        assert network.claim(2, "a", number, keys(number)) == Claimed(True)
        assert network.claim(3, "b", number, keys(number)) == Claimed(False, 1, 1.0)
    assert network.claims(3) == 0


def kept_by(network: Network, owner: int, asker: int) -> list[bytes]:
    """A run whose claims are the owner's."""
    return next([key] for key in keys(*range(1000)) if network.agreements[asker].owner(key) == str(owner))


def test_who_does_not_answer_in_time_is_gone_on_without() -> None:
    network = Network(2)
    run = kept_by(network, 1, 0)
    network.deaf = {1}
    assert network.agreements[0].due_ms(network.now) == math.inf
    assert network.claim(0, "a", 1, run) is None
    network.passes(ANSWER_MS_MAX - 1)
    assert network.answered(0, 1) is None
    assert network.agreements[0].due_ms(network.now) == 1
    network.passes(1)
    assert network.agreements[0].due_ms(network.now) == math.inf
    assert network.answered(0, 1) == Claimed(True)
    assert network.agreements[0].heard("1", 1, Claimed(False, 1, 1.0), network.now) == [], "it is said already"
    assert network.agreements[0].counts() == {"routers": 1, "claims": 1, "keepers": 1, "claims_unanswered_total": 1}


def test_who_did_not_answer_shows_in_the_metrics() -> None:
    metrics = BusMetrics()
    network = Network(2)
    network.deaf = {1}
    network.claim(0, "a", 1, kept_by(network, 1, 0))
    network.passes(ANSWER_MS_MAX)
    metrics.values = dict(network.agreements[0].counts())
    samples = {sample.name: sample.value for family in metrics.collect() for sample in family.samples}
    assert samples["headstart_bus_claims_unanswered_total"] == 1


def test_who_is_found_dead_meanwhile_is_not_waited_for() -> None:
    network = Network(2)
    run = kept_by(network, 1, 0)
    network.deaf = {1}
    assert network.claim(0, "a", 1, run) is None
    network.agreements[0].live({})
    network.passes(1)
    assert network.answered(0, 1) == Claimed(True)


def test_both_sides_of_a_cut_go_on_and_agree_again_afterwards() -> None:
    network = Network(2)
    network.cut = {frozenset({0, 1})}
    for number, seen in ((1, False), (2, True)):
        # Before and after the cut is noticed.
        if seen:
            network.see()
        assert network.claim(0, "a", number, keys(number)) == Claimed(True)
        assert network.claim(1, "b", number, keys(number)) == Claimed(True)
    network.cut = set()
    network.see()
    for number in range(3, 9):
        assert network.claim(0, "a", number, keys(number)) == Claimed(True)
        assert network.claim(1, "b", number, keys(number)) == Claimed(False, 1, 1.0)


def test_a_claim_elsewhere_lasts_as_long_as_its_router_and_no_longer() -> None:
    network = Network(2)
    run = kept_by(network, 1, 0)
    assert network.claim(0, "a", 1, run) == Claimed(True)
    for _ in range(3 * SILENCE_MS_MAX // 500):
        network.live(0, "a")
        network.passes(500)
    assert network.claim(1, "b", 1, run) == Claimed(False, 1, 0.0), "its bus says that it lives"
    while network.claims(0):
        network.passes(500)
    assert network.now < 5 * SILENCE_MS_MAX
    assert network.claims(1) == 0, "its bus says that it is silent"
    assert network.claim(1, "b", 1, run) == Claimed(True)


def test_a_claim_of_a_node_that_dies_ends_by_silence() -> None:
    network = Network(2)
    run = kept_by(network, 1, 0)
    assert network.claim(0, "a", 1, run) == Claimed(True)
    network.cut = {frozenset({0, 1})}
    network.passes(SILENCE_MS_MAX)
    assert network.claim(1, "b", 1, run) == Claimed(False, 1, 0.0)
    network.passes(1)
    assert network.claim(1, "b", 1, run) == Claimed(True)


@pytest.mark.parametrize(
    "reply",
    [
        Done(),
        Denied("no"),
        Claimed(False, 0, 1.0),
        Claimed(False, -1, 1.0),
        Claimed(False, 3, 1.0),
        Claimed(False, 1, -1.0),
        Claimed(False, 1, math.nan),
        Claimed(False, 1, math.inf),
    ],
)
def test_an_answer_that_can_not_be_keeps_nobody_from_computing(reply: Reply) -> None:
    network = Network(2)
    run = kept_by(network, 1, 0)
    network.deaf = {1}
    assert network.claim(0, "a", 1, [*run, *keys(7000)]) is None
    assert network.agreements[0].heard("other", 1, Claimed(False, 1, 1.0), 0.0) == [], "it was not asked"
    assert network.agreements[0].heard("1", 2, Claimed(False, 1, 1.0), 0.0) == [], "nor that"
    network._do(0, network.agreements[0].heard("1", 1, reply, 0.0))
    assert network.answered(0, 1) == Claimed(True)


def test_nobody_speaks_for_another_nodes_router() -> None:
    network = Network(2)
    it = network.agreements[1]
    assert network.claim(1, "b", 1, keys(1)) is not None
    it.end(EndClaim("b", 1), elsewhere=True)
    assert network.claims(1) == 1
    (answer,) = it.claim(b"n", 1, Claim("b", 2, keys(2), 1.0), 0.0, elsewhere=True)
    assert isinstance(answer, Answer)
    assert answer.body == Claimed(True), "and nothing is kept"
    assert network.claims(1) == 1
    it.exchange(b"n", 0, Exchange(["b", "unknown"], {}, False), SILENCE_MS_MAX + 1)
    it.end_silent(SILENCE_MS_MAX + 1)
    assert network.claims(1) == 0


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
def test_a_claim_without_an_end_is_refused(seconds: float) -> None:
    with pytest.raises(BusError, match="in how many seconds"):
        Claims().claim(b"c", 1, Claim("a", 1, keys(1), seconds), 0.0)


def test_what_other_nodes_may_fill_is_bounded() -> None:
    claims = Claims()
    for number in range(ELSEWHERE_MAX + 10):
        claims.claim(b"n", 1, Claim(f"r{number}", 1, keys(number), 1.0), 0.0, elsewhere=True)
    assert claims.counts() == {"routers": 0, "claims": ELSEWHERE_MAX}
    claims.end_silent(SILENCE_MS_MAX + 1)
    run, count = 16_384, 0
    while count * run <= ELSEWHERE_KEYS_MAX:
        first = count * run
        claims.claim(b"n", 1, Claim("r", count, keys(*range(first, first + run)), 1.0), 0.0, elsewhere=True)
        count += 1
    assert claims.counts()["claims"] == ELSEWHERE_KEYS_MAX // run < CLAIMS_MAX
    assert claims.claim(b"c", 1, Claim("own", 1, keys(1 << 40), 1.0), 0.0) and claims.has("own", 1)
    claims.end(EndClaim("r", 0), elsewhere=True)
    claims.claim(b"n", 1, Claim("r", count, keys(1 << 41), 1.0), 0.0, elsewhere=True)
    assert claims.has("r", count), "there is room again"


steps = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), st.integers(0, 2), st.integers(0, 5)),
        st.tuples(st.just("end"), st.integers(0, 2), st.integers(0, 5)),
        st.tuples(st.just("cut"), st.integers(0, 2), st.integers(0, 2)),
        st.tuples(st.just("heal"), st.just(0), st.just(0)),
        st.tuples(st.just("passes"), st.integers(0, 40), st.just(0)),
    ),
    max_size=60,
)


@given(steps)
def test_every_claim_is_answered_and_while_nothing_is_cut_only_one_has_a_prompt(sequence: list[tuple[str, int, int]]) -> None:
    network = Network(3)
    held: dict[int, set[int]] = {}
    was_cut = False
    for what, one, other in sequence:
        for at in range(3):
            network.live(at, f"r{at}")
        if what == "claim" and one not in held.get(other, set()):
            claimed = network.claim(one, f"r{one}", other, keys(other))
            if claimed is None:
                network.passes(ANSWER_MS_MAX)
                claimed = network.answered(one, other)
            assert claimed is not None
            if not was_cut:
                assert claimed.granted == (not held.get(other))
            if claimed.granted:
                held.setdefault(other, set()).add(one)
        elif what == "end" and one in held.get(other, set()):
            network.end(one, f"r{one}", other)
            held[other].discard(one)
        elif what == "cut" and one != other:
            network.cut.add(frozenset({one, other}))
            was_cut = True
        elif what == "heal":
            network.cut.clear()
            network.see()
            if not any(held.values()):
                # What was not told to end while it was cut off is silent by now.
                network.passes(SILENCE_MS_MAX + 1)
                was_cut = False
        else:
            network.passes(one)
