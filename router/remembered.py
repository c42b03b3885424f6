"""Prompts that were rendered lately: how much of a new text is known, without rendering it again. Pure.

A long prompt that differs from an earlier one only at its end need not be tokenised to be routed: that so much of its text is the same tells about
how many of its chunks are. The engine tokenises it all the same, and what it pulls it looks up by its own keys; a guess that is wrong costs
time and changes no token.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
from blake3 import blake3

STARTS_BYTES = (1 << 10, 1 << 12)
BLOCK_BYTES = 1 << 14
"""Where the beginnings end by which texts are found: two short ones, then every block."""

BYTES_MAX = 256 << 20
"""Text that is remembered."""

_DENSER = 1.5
"""Tokens are not spread evenly over a text: the part that differs may have so many more than its share."""


@dataclass(eq=False)
class _Rendered:
    names: list[bytes]
    text: bytes
    tokens: int
    keys: Sequence[bytes]
    tenant: bytes


@dataclass(frozen=True)
class Guess:
    """A prompt of about ``tokens``; ``keys`` are the chunks of it that an earlier one had, too."""

    tokens: int
    keys: Sequence[bytes]


class Remembered:
    """Rendered prompts by the beginnings of their texts; those that were of use longest ago are forgotten first."""

    def __init__(self, bytes_max: int = BYTES_MAX) -> None:
        self._bytes_max, self._bytes = bytes_max, 0
        self._by_name: dict[bytes, _Rendered] = {}
        self._prompts: OrderedDict[int, _Rendered] = OrderedDict()

    def add(self, space: bytes, text: bytes, tokens: int, keys: Sequence[bytes], tenant: bytes = b"") -> None:
        """A text of ``tenant`` was rendered. Texts of different ``space`` (model, tenant, endpoint) are never compared."""
        names = list(_names(space, text))
        if not names or not tokens or len(text) > self._bytes_max:
            return
        rendered = _Rendered(names, text, tokens, keys, tenant)
        before = {id(known): known for name in names if (known := self._by_name.get(name)) is not None}
        self._by_name.update(dict.fromkeys(names, rendered))
        self._prompts[id(rendered)] = rendered
        self._bytes += len(text)
        for known in before.values():
            # One that begins like another, or is the same again, takes its names over: without any it would only take room.
            if all(self._by_name.get(name) is not known for name in known.names):
                self._forget(known)
        while self._bytes > self._bytes_max:
            self._forget(next(iter(self._prompts.values())))

    @property
    def texts(self) -> int:
        """How many are remembered."""
        return len(self._prompts)

    def clear(self, tenant: bytes) -> None:
        """Forgets what ``tenant`` asked, or, b"", all."""
        for rendered in [one for one in self._prompts.values() if tenant in (b"", one.tenant)]:
            self._forget(rendered)

    def _forget(self, rendered: _Rendered) -> None:
        del self._prompts[id(rendered)]
        self._bytes -= len(rendered.text)
        for name in rendered.names:
            if self._by_name.get(name) is rendered:
                del self._by_name[name]

    def find(self, space: bytes, text: bytes, chunk_tokens: int) -> Guess | None:
        """What is known of a text; None where it begins like no other."""
        known = None
        for name in _names(space, text):
            found = self._by_name.get(name)
            if found is None:
                break
            known = found
        if known is None:
            return None
        self._prompts.move_to_end(id(known))
        each = known.tokens / len(known.text)
        alike = _alike(text, known.text)
        tokens = known.tokens - (len(known.text) - alike) * each * _DENSER
        return Guess(round(known.tokens + (len(text) - len(known.text)) * each), known.keys[: max(0, int(tokens)) // chunk_tokens])


def text_of(body: dict[str, object]) -> bytes:
    """What of a request its prompt is made of, the same bytes for the same prompt, in the order in which templates put it."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return prompt.encode("utf-8", "surrogatepass")
    return msgspec.json.encode([body.get("tools"), body.get("system") or body.get("instructions"), body.get("messages") or body.get("input"), prompt])


def _names(space: bytes, text: bytes) -> Iterator[bytes]:
    """A name for each beginning of the text that texts are found by."""
    name, start = blake3(space).digest(), 0
    for end in itertools.chain(STARTS_BYTES, range(BLOCK_BYTES, len(text) + 1, BLOCK_BYTES)):
        if end > len(text):
            return
        name = blake3(name + text[start:end]).digest()
        yield name
        start = end


def _alike(one: bytes, other: bytes) -> int:
    """How many bytes two texts begin with alike."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
