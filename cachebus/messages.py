"""The wire vocabulary of the cache bus: msgspec structs, packed by ``cachebus.codec``.

Fields are only ever appended, with defaults; any other change raises ``codec.PROTOCOL_VERSION``. Keys are 32 bytes, lengths bytes, times ms.
"""

from __future__ import annotations

from cachebus.chunk import TENANT_BYTES
from cachebus.messages_handover import HandoverRequest, SharedMemory
from cachebus.messages_hbm import HbmChanged, HbmOpened, HbmRequest
from cachebus.messages_peers import Lend, Lent, Missed
from cachebus.messages_routers import Claimed, Exchanged, OtherLoads, RouterRequest
from cachebus.messages_tools import Chunks, Clear, Cleared, Count, ListChunks, Pin
from cachebus.wire import Message, Role, Tier

# Requests of every client.


class Hello(Message, frozen=True):
    """First message of a client. ``holder`` names the lock file whose locks say that the client lives; "" holds nothing."""

    client: str
    holder: str = ""


class Ping(Message, frozen=True):
    """Asks for the daemon's epoch, so that a client notices a restart."""

    holder: str = ""


class Snapshot(Message, frozen=True):
    """Asks for the whole directory and all workers, as of one event; or for what came after the batch ``seq`` of ``epoch``, where that is known."""

    epoch: int = -1
    seq: int = -1


class Stat(Message, frozen=True):
    """Asks for the daemon's counters."""


# Requests of engines.


class RegisterEngine(Message, frozen=True):
    """What an engine's KV means and how its bytes lie. Refused where a living engine of the same model differs."""

    worker: str
    role: Role
    holder: str
    model: str
    namespace: bytes
    namespace_parts: dict[str, str]
    layout: bytes
    layout_parts: dict[str, str]
    block_size: int
    chunk_size: int
    chunk_bytes: int


class Acquire(Message, frozen=True):
    """Asks for a lease on the longest run of ``keys`` from the first on that any tier has.

    A key that another engine is writing is waited for, ``wait_ms`` at most, and so is the shared tier's answer; with ``ready_only`` also the
    bytes themselves, with ``expected`` also the first key's writer. ``reaches``: devices whose memory the asker reads, so that it may be
    granted blocks that another engine offers there, before what the region has.
    """

    holder: str
    layout: bytes
    keys: list[bytes]
    wait_ms: int
    ready_only: bool = False
    expected: bool = False
    reaches: list[str] = []  # noqa: RUF012 - msgspec gives each message its own


class Withdraw(Message, frozen=True):
    """Nobody waits for the answer to this client's Acquire of that ticket: ends its wait, or the lease it was granted.

    A lease is lent before its number is known: an engine that stops caring meanwhile may not look for the answer for long. Answered
    with nothing.
    """

    acquire: int


class Release(Message, frozen=True):
    """Ends leases; answered with nothing."""

    leases: list[int]


class NewEntry(Message, frozen=True):
    """A chunk (or, with ``tail``, one block of a prompt's end) that is about to be written. ``expires_at``: seconds since 1970, 0: never."""

    key: bytes
    length: int
    tail: bool = False
    tenant: bytes = bytes(TENANT_BYTES)
    expires_at: int = 0


class Reserve(Message, frozen=True):
    """Asks for an extent for each entry; what exists already or finds no room gets none."""

    holder: str
    layout: bytes
    entries: list[NewEntry]


class WrittenEntry(Message, frozen=True):
    """An entry whose bytes lie in the region: ``slot`` and ``generation`` as they were reserved."""

    slot: int
    generation: int
    digest: bytes


class Commit(Message, frozen=True):
    """Publishes written entries; answered with nothing."""

    holder: str
    entries: list[WrittenEntry]


class Abandon(Message, frozen=True):
    """Gives reserved extents back unwritten; answered with nothing."""

    holder: str
    slots: list[tuple[int, int]]


class Quarantine(Message, frozen=True):
    """Says that what was pulled under ``key`` does not match ``digest``: nobody may be given it again."""

    key: bytes
    digest: bytes


class Reattach(Message, frozen=True):
    """After a daemon's restart: what this holder still reads (``reading``: offsets by lease) and writes (``writing``: slots)."""

    holder: str
    reading: dict[int, list[int]]
    writing: list[int]


class Report(Message, frozen=True):
    """Where a request's prompt tokens came from, sent when its first own token is computed.

    ``hbm_tokens`` lay in the engine's prefix cache, ``pulled`` says how many came from which tier; the rest was computed. ``token_seconds``,
    ``attended_seconds`` and ``byte_seconds`` are what the engine has learnt by then (``cachebus.engine.break_even``): seconds a token computed, a
    token attended to, and a byte pulled from a tier; 0 or absent where it does not know. ``longest_tokens``: up to what length of context.
    """

    transfer_id: str
    leg: str
    worker: str
    prompt_tokens: int
    hbm_tokens: int
    pulled: dict[Tier, int]
    token_seconds: float = 0.0
    attended_seconds: float = 0.0
    byte_seconds: dict[Tier, float] = {}  # noqa: RUF012 - msgspec gives each message its own
    longest_tokens: int = 0

    @property
    def pulled_tokens(self) -> int:
        """Tokens from all tiers."""
        return sum(self.pulled.values())


# Requests of workers' supervisors.


class RegisterWorker(Message, frozen=True):
    """A worker whose HTTP server answers and that takes requests. Repeated after a daemon's restart. ``adapters``: LoRA weights' digests by name."""

    worker: str
    role: Role
    holder: str
    url: str
    model: str
    max_model_len: int
    takes_prompt_token_ids: bool
    adapters: dict[str, str] = {}  # noqa: RUF012 - msgspec gives each message its own


class Drain(Message, frozen=True):
    """The worker takes no new requests; those it has go on."""

    worker: str


class Leave(Message, frozen=True):
    """The worker is gone for good."""

    worker: str


# Replies.


class Welcome(Message, frozen=True):
    """Reply to Hello. ``digest_key`` (32 bytes) keys every chunk's digest."""

    epoch: int
    region_path: str
    region_bytes: int
    chunk_size: int
    digest_key: bytes


class Pong(Message, frozen=True):
    """Reply to Ping. ``attached``: whether this epoch has the holder's Reattach or Hello. ``key_id`` names the digest key (8 bytes).

    ``node``: who the daemon is among those that keep claims (8 bytes); nothing where it keeps none for other nodes.
    """

    epoch: int
    attached: bool
    key_id: bytes = b""
    node: bytes = b""


class Done(Message, frozen=True):
    """Reply to what needs no more than a yes."""


class Denied(Message, frozen=True):
    """Reply to a request that can't be granted; ``reason`` is for people."""

    reason: str


class Extent(Message, frozen=True):
    """The bytes of one entry: ``length`` bytes at ``offset`` of the region.

    Where they are not ``ready`` the daemon is still bringing them from ``source``: they are there once the table's record in ``slot`` says
    committed under this ``generation``, and never where it says anything else but reserved. With ``memory`` they are not in the region but in
    these ``blocks`` of an engine's own memory, for as long as it does not reuse them: what is read there is worth what its digest says.
    """

    key: bytes
    offset: int
    length: int
    digest: bytes
    slot: int = 0
    generation: int = 0
    ready: bool = True
    source: Tier = "dram"
    memory: bytes = b""
    blocks: list[int] = []  # noqa: RUF012 - msgspec gives each message its own


class Granted(Message, frozen=True):
    """Reply to Acquire: the extents of the keys found, in order; no lease (0) where there are none. ``memories``: those that they name."""

    lease: int
    extents: list[Extent]
    memories: list[SharedMemory] = []  # noqa: RUF012 - msgspec gives each message its own


class Slot(Message, frozen=True):
    """An extent to write: ``slot`` and ``generation`` name it in Commit and Abandon."""

    key: bytes
    slot: int
    generation: int
    offset: int


class Reserved(Message, frozen=True):
    """Reply to Reserve: the slots granted, in the order of the entries, those without one left out."""

    slots: list[Slot]


class StatReply(Message, frozen=True):
    """Reply to Stat: gauges and counters by name."""

    epoch: int
    values: dict[str, float]


class Worker(Message, frozen=True):
    """A registered worker as others see it. ``parts``: what its KV means and how it lies, for people; ``node``: the peer that told of it, if any."""

    worker: str
    role: Role
    url: str
    model: str
    namespace: bytes
    block_size: int
    chunk_size: int
    max_model_len: int
    takes_prompt_token_ids: bool
    draining: bool = False
    chunk_bytes: int = 0
    parts: dict[str, str] = {}  # noqa: RUF012 - msgspec gives each message its own
    node: str = ""
    adapters: dict[str, str] = {}  # noqa: RUF012 - msgspec gives each message its own


class SnapshotReply(Message, frozen=True):
    """Reply to Snapshot: after event ``seq`` of ``epoch`` every committed key, by tier, every worker, and the keys in each one's HBM."""

    epoch: int
    seq: int
    keys: dict[Tier, list[bytes]]
    workers: list[Worker]
    hbm: dict[str, list[bytes]] = {}  # noqa: RUF012 - msgspec gives each message its own


# Events.


class Stored(Message, frozen=True):
    """These entries can be pulled from now on."""

    keys: list[bytes]
    tier: Tier = "dram"


class Removed(Message, frozen=True):
    """These entries are gone from ``tier``."""

    keys: list[bytes]
    tier: Tier = "dram"


class WorkerUp(Message, frozen=True):
    """A worker joined, or what is known of it changed (it drains, say)."""

    worker: Worker


class WorkerDown(Message, frozen=True):
    """A worker left or died."""

    worker: str


Request = (
    Hello
    | Ping
    | Snapshot
    | Stat
    | RegisterEngine
    | Acquire
    | Withdraw
    | Release
    | Reserve
    | Commit
    | Abandon
    | Quarantine
    | HandoverRequest
    | Reattach
    | Report
    | ListChunks
    | Pin
    | Clear
    | RegisterWorker
    | Drain
    | Leave
    | Lend
    | HbmRequest
    | RouterRequest
)
Reply = (
    Welcome
    | Pong
    | Done
    | Denied
    | Granted
    | Reserved
    | Chunks
    | Count
    | StatReply
    | SnapshotReply
    | Lent
    | Missed
    | HbmOpened
    | Claimed
    | OtherLoads
    | Exchanged
)
Event = Stored | Removed | WorkerUp | WorkerDown | Report | HbmChanged | Cleared
