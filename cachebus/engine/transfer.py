"""What the connector's scheduler half tells its worker half, and what a request carries. Plain data.

vLLM itself carries ``StepPlan`` from the engine core to the workers, inside its own metadata message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from cachebus.chunk import TENANT_BYTES
from cachebus.wire import Tier

SAVING_STEPS_MAX = 8
"""How many steps' saves may be under way at once; the engine waits for the oldest before it begins another."""

PARAMS_KEY = "headstart"
"""Key of Headstart's part in a request's ``kv_transfer_params``."""


class TransferParams(msgspec.Struct, frozen=True):
    """What the router says of a request: under which id to report where its tokens came from, and for which leg.

    ``store``: whether what it computes may be published; ``ttl_seconds``: after which that is dropped, 0: never for that reason.
    ``follow_ms``: another engine is computing the prompt at this moment, and each of its parts is waited for so long; 0: nobody is.
    """

    transfer_id: str
    leg: str
    store: bool = True
    ttl_seconds: int = 0
    follow_ms: int = 0


@dataclass(frozen=True)
class LoadPiece:
    """One extent to pull. ``blocks[i]`` is where its i-th block goes; -1 leaves that block out.

    Where it is not ``ready`` its bytes are there once the region's record in ``slot`` is committed under ``generation``. With ``memory`` they are not
    in the region but ``there``, in these blocks of another engine.
    """

    key: bytes
    offset: int
    length: int
    digest: bytes
    blocks: list[int]
    slot: int = 0
    generation: int = 0
    ready: bool = True
    source: Tier = "dram"
    memory: bytes = b""
    there: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Coming:
    """A part of a prompt that somebody is still computing: the name it will be stored under, and where its blocks go."""

    key: bytes
    blocks: list[int]


@dataclass(frozen=True)
class Follow:
    """What another engine is computing of a prompt: it is asked for in ``holder``'s name, and each next part is waited for ``wait_ms``."""

    holder: str
    layout: bytes
    wait_ms: int
    coming: list[Coming]


@dataclass(frozen=True)
class Load:
    """What one tensor-parallel rank pulls for a request: ``pieces`` under a lease (0: there are none), then what it ``follows``."""

    request_id: str
    lease: int
    pieces: list[LoadPiece]
    rank: int = 0
    follows: Follow | None = None


@dataclass(frozen=True)
class Save:
    """A chunk (or a block of a prompt's tail) whose tokens are all computed when this step's forward pass ends, and where it lies.

    Every rank saves its part, under ``rank_key``. ``ttl_seconds``: after which it is dropped; 0: never for that reason.
    """

    key: bytes
    blocks: list[int]
    tail: bool
    tenant: bytes = bytes(TENANT_BYTES)
    ttl_seconds: int = 0


@dataclass
class StepPlan:
    """One engine step's transfers.

    ``number``: of the steps that save, which one this is; 0 where it saves nothing. ``fence``: the step writes blocks of chunks that the
    step of that number saves, so the saves up to it must have ended first; 0 where it writes none. ``tail_fence``: the same for blocks of
    prompts' tails, which are saved first, since a prompt's next token goes into its last block. ``idle``: the step computes nothing;
    ``tokens``, which attend to ``attended`` tokens in all: 0 where it computes nothing of a prompt. ``let_go``: requests that have ended and whose
    blocks nobody needs any more.
    """

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    number: int = 0
    fence: int = 0
    tail_fence: int = 0
    idle: bool = False
    tokens: int = 0
    attended: float = 0.0
    let_go: list[str] = field(default_factory=list)


_T = TypeVar("_T")


def in_batches(items: Iterable[_T], bytes_max: int, length: Callable[[_T], int]) -> Iterator[list[_T]]:
    """The items in order, in batches of at most ``bytes_max`` bytes; an item that is longer is a batch of its own."""
    batch: list[_T] = []
    taken = 0
    for item in items:
        if batch and taken + length(item) > bytes_max:
            yield batch
            batch, taken = [], 0
        batch.append(item)
        taken += length(item)
    if batch:
        yield batch


def transfer_params(kv_transfer_params: Mapping[str, Any] | None) -> TransferParams | None:
    """The router's part of a request's parameters; None where there is none or it is not well formed."""
    part = (kv_transfer_params or {}).get(PARAMS_KEY)
    try:
        return msgspec.convert(part, TransferParams) if part is not None else None
    except msgspec.ValidationError:
        return None
