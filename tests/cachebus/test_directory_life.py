"""The directory in any order of events, against a model."""

from directory_node import Node, key
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cachebus.messages import Granted, Quarantine, Reattach, Slot


class Life(RuleBasedStateMachine):
    """Engines that reserve, commit, abandon, pull and die, and a daemon that restarts, in any order.

    The model is what each extent holds: a write that lands in an extent which somebody else reads or writes is the one
    thing that must never happen, so every write is checked against every open lease.
    """

    def __init__(self) -> None:
        super().__init__()
        self.node = Node(pages=4)
        self.writing: dict[int, tuple[str, Slot]] = {}
        self.reading: dict[int, tuple[str, Granted]] = {}
        self.epoch = 1

    @rule(numbers=st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True), holder=st.sampled_from("ab"))
    def reserve(self, numbers: list[int], holder: str) -> None:
        for slot in self.node.reserve(*numbers, holder=holder):
            busy = {s.offset for _, s in self.writing.values()} | {e.offset for _, g in self.reading.values() for e in g.extents}
            assert slot.offset not in busy
            self.writing[slot.slot] = (holder, slot)

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), commit=st.booleans())
    def finish(self, data: st.DataObject, commit: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.writing)))
        holder, slot = self.writing.pop(number)
        if commit:
            self.node.commit([slot], holder)
        else:
            self.node.apply(self.node.directory.abandon(holder, [(slot.slot, slot.generation)], 0))

    @rule(numbers=st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True), holder=st.sampled_from("ab"))
    def pull(self, numbers: list[int], holder: str) -> None:
        granted = self.node.acquire(*numbers, holder=holder)
        assert granted is not None
        assert [e.key for e in granted.extents] == [key(n) for n in numbers][: len(granted.extents)]
        assert not {e.offset for e in granted.extents} & {s.offset for _, s in self.writing.values()}
        if granted.lease:
            self.reading[granted.lease] = (holder, granted)

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), bad=st.booleans())
    def done(self, data: st.DataObject, bad: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.reading)))
        _, granted = self.reading.pop(number)
        if bad:
            extent = granted.extents[0]
            self.node.apply(self.node.directory.quarantine(Quarantine(extent.key, extent.digest)))
        self.node.apply(self.node.directory.release([number]))

    @rule(holder=st.sampled_from("ab"))
    def die(self, holder: str) -> None:
        self.node.apply(self.node.directory.holder_died(holder, 0))
        self.writing = {n: item for n, item in self.writing.items() if item[0] != holder}
        self.reading = {n: item for n, item in self.reading.items() if item[0] != holder}

    @rule()
    def restart(self) -> None:
        self.epoch += 1
        living = {holder for holder, _ in [*self.writing.values(), *self.reading.values()]}
        new = Node(pages=4, epoch=self.epoch)
        new.table = dict(self.node.table)
        new.apply(new.directory.adopt(self.node.table.items(), living))
        for holder in living:
            reading = {n: [e.offset for e in g.extents] for n, (h, g) in self.reading.items() if h == holder}
            writing = [s.slot for h, s in self.writing.values() if h == holder]
            new.apply(new.directory.reattach(Reattach(holder, reading, writing), 0))
        assert new.directory.leases() == set(self.reading)
        self.node = new

    @invariant()
    def holds(self) -> None:
        self.node.directory.check_integrity()
        statistics = self.node.directory.statistics()
        assert statistics["leases"] == len(self.reading)
        assert statistics["writing"] == len(self.writing)
        recorded = {record.key for record in self.node.table.values() if record.digest.strip(b"\0") and not record.tail}
        assert recorded >= set(self.node.directory.keys())


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
