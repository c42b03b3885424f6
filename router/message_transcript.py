"""What a client has of a stream of Anthropic's messages, so that another worker can say it again from the prompt on and the client reads on. Pure.

Such a stream has no token ids, so nothing continues in its middle: another engine computes the answer again, and what it says is held against
what the client has, block by block and character by character; where it differs, Diverged. ``router.transcript`` is the same for OpenAI's streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from router.late_reader import LateReader
from router.transcript import Diverged, EngineFailed
from router.usage import EVENT_END, is_engine_failure, parted

_STOP = b"event: message_stop"
_ERROR = b"event: error"
_TEXTS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
"""Where a delta has its text, by its type."""


@dataclass
class _Block:
    """``at``: how many characters of it the engine has said by now."""

    kind: str
    name: str | None
    text: str = ""
    at: int = 0
    signed: bool = False
    stopped: bool = False


class MessageTranscript(LateReader):
    """A stream of one message."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: list[_Block] = []
        self._heard = 0
        self._started = False

    @property
    def progress(self) -> int:
        """How much the client has: characters."""
        self._read()
        return sum(len(block.text) for block in self._blocks)

    @property
    def continues(self) -> bool:
        """Whether the engine began in the middle: never."""
        return False

    def begin_again(self) -> None:
        """Another engine answers next, from the prompt on."""
        self._read()
        self._rest, self._again, self._heard = b"", True, 0
        for block in self._blocks:
            block.at = 0

    def feed(self, piece: bytes) -> bytes:
        """What the client gets of the next bytes, in whole events. Raises Diverged, EngineFailed."""
        whole, end = self._whole(piece)
        if not end:
            return b""
        if self._again or _ERROR in whole:
            return self._now(whole)
        self.done = self.done or _STOP in whole
        self._later(whole)
        return whole + end

    def closing(self, *, with_usage: bool) -> bytes:
        """The end of an answer that the client has but for its last event; its usage came before."""
        self.done = True
        return _encoded({"type": "message_stop"})

    def _event(self, event: bytes) -> bytes:
        if is_engine_failure(event + EVENT_END):
            raise EngineFailed(event.decode("utf-8", "replace"))
        try:
            said = msgspec.json.decode(parted(event)[1])
            fresh = self._take(said)
        except (msgspec.DecodeError, UnicodeDecodeError, TypeError, AttributeError, LookupError):
            # No event that an engine is known to send: it passes, and nothing is built on it.
            self._blind = True
            return event + EVENT_END
        if not fresh:
            return b""
        return _encoded(said) if self._again else event + EVENT_END

    def _take(self, said: dict[str, Any]) -> bool:
        """Writes an event down, and takes out of it what the client has. False where nothing is left."""
        kind = said["type"]
        if kind == "message_start":
            fresh, self._started = not self._started, True
        elif kind == "content_block_start":
            fresh = self._start(said["index"], said["content_block"])
        elif kind == "content_block_delta":
            fresh = self._grow(self._blocks[said["index"]], said["delta"])
        elif kind == "content_block_stop":
            fresh = self._stop(self._blocks[said["index"]])
        elif kind == "message_delta":
            fresh = self._finish()
        else:
            self.done, fresh = self.done or kind == "message_stop", True
            self._blind = self._blind or kind not in ("message_stop", "ping")
        return fresh

    def _start(self, index: int, block: dict[str, Any]) -> bool:
        if index != self._heard:
            raise LookupError(index)
        self._heard += 1
        if index == len(self._blocks):
            self._blocks.append(_Block(block["type"], block.get("name")))
            return True
        if (block["type"], block.get("name")) != (self._blocks[index].kind, self._blocks[index].name):
            raise Diverged("another block than before")
        return False

    def _grow(self, block: _Block, delta: dict[str, Any]) -> bool:
        if delta["type"] == "signature_delta":
            # vLLM draws it by chance.
            fresh, block.signed = not block.signed, True
            return fresh
        name = _TEXTS[delta["type"]]
        piece = delta[name]
        known = block.text[block.at : block.at + len(piece)]
        if not piece.startswith(known) or (block.stopped and len(known) < len(piece)):
            raise Diverged("other text than before")
        block.at += len(piece)
        delta[name] = piece[len(known) :]
        block.text += delta[name]
        return bool(delta[name])

    @staticmethod
    def _stop(block: _Block) -> bool:
        if block.at < len(block.text):
            raise Diverged("it ends before what was sent")
        fresh, block.stopped = not block.stopped, True
        return fresh

    def _finish(self) -> bool:
        if self._heard < len(self._blocks):
            raise Diverged("it ends before what was sent")
        fresh, self._finished = not self._finished, True
        return fresh


def _encoded(said: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s%s" % (said["type"].encode(), msgspec.json.encode(said), EVENT_END)
