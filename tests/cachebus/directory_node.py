"""A directory, driven as the daemon drives it."""

from cachebus.directory import Directory
from cachebus.effects import Answer, Effect, Job, Publish, Start, WipeRecord, WriteRecord
from cachebus.messages import Acquire, Granted, NewEntry, Reserve, Reserved, Slot, WrittenEntry
from cachebus.table import Record

PAGE = 4096
LAYOUT = b"l" * 16
CLIENT = b"client"


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def answer(effects: list[Effect]) -> Answer:
    (found,) = [effect for effect in effects if isinstance(effect, Answer)]
    return found


class Node:
    """A directory and the table that its effects write."""

    def __init__(self, pages: int = 8, epoch: int = 1) -> None:
        self.directory = Directory(pages * PAGE, 64, epoch)
        self.table: dict[int, Record] = {}
        self.events: list[object] = []
        self.jobs: list[Job] = []

    def apply(self, effects: list[Effect]) -> list[Effect]:
        for effect in effects:
            if isinstance(effect, WriteRecord):
                self.table[effect.slot] = effect.record
            elif isinstance(effect, WipeRecord):
                self.table.pop(effect.slot, None)
            elif isinstance(effect, Start):
                self.jobs.append(effect.job)
            elif isinstance(effect, Publish):
                self.events.append(effect.event)
        return effects

    def reserve(self, *numbers: int, holder: str = "w", tail: bool = False, layout: bytes = LAYOUT, pages: int = 1) -> list[Slot]:
        entries = [NewEntry(key(n), pages * PAGE, tail) for n in numbers]
        body = answer(self.apply(self.directory.reserve(CLIENT, 1, Reserve(holder, layout, entries)))).body
        assert isinstance(body, Reserved)
        return body.slots

    def commit(self, slots: list[Slot], holder: str = "w") -> list[Effect]:
        written = [WrittenEntry(s.slot, s.generation, b"digest of " + s.key) for s in slots]
        return self.apply(self.directory.commit(holder, written, 0))

    def store(self, *numbers: int, **options: object) -> None:
        self.commit(self.reserve(*numbers, **options))  # type: ignore[arg-type]

    def acquire(
        self, *numbers: int, holder: str = "r", wait_ms: int = 0, now: float = 0, layout: bytes = LAYOUT, expected: bool = False
    ) -> Granted | None:
        request = Acquire(holder, layout, [key(n) for n in numbers], wait_ms, expected=expected)
        effects = self.apply(self.directory.acquire(CLIENT, 2, request, now))
        if not effects:
            return None
        body = answer(effects).body
        assert isinstance(body, Granted)
        return body

    def stat(self, name: str) -> float:
        return self.directory.statistics()[name]


def restarted(node: Node, living: set[str], epoch: int = 2) -> Node:
    new = Node(epoch=epoch)
    new.table = dict(node.table)
    new.apply(new.directory.adopt(node.table.items(), living))
    new.directory.check_integrity()
    return new
