"""What a client has of a stream, so that another worker can go on with it: no token twice, none missing, never a wrong join. Pure.

The engine's place in the stream is kept beside the client's. While one worker answers they are the same. When another one begins again, from the
prompt or from a token in the middle, what it says is held against what the client has until it comes to what is new; where it differs, Diverged.

Hardly any stream is ever gone on with, so events are kept as they came and read only when that is asked for.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from router.late_reader import LateReader
from router.usage import EVENT_END

_DATA = b"data: "
_DONE = b"data: [DONE]"
_IDS = b'"token_ids":['
_PROMPT_IDS = b'"prompt_token_ids":['
_BROKEN_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_MARKS_MAX = 256
_SERVER_ERRORS_FROM = 500
_FAILS, _SAYS_NOTHING = b'"error":', b'"delta":{}'
"""What is in events that can't be passed on unread; inside a JSON string its quotes would be escaped."""
_ASKED_BY_US = re.compile(rb'("(?:prompt_)?token_ids":)\[[^\]]*\]')
_TEXTS = ("content", "reasoning", "reasoning_content")

Channel = tuple[str, int]
"""One run of text in an answer: what it is, and of which tool call."""
_CONTENT: Channel = ("content", 0)


class Diverged(Exception):
    """Another worker's answer does not begin with what the client already has."""


class EngineFailed(Exception):
    """The engine said in the middle of its stream that it failed."""


class _Text:
    """A channel's text that the client has, in pieces; ``at``: how many characters of it the engine has said by now."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self.length = self.at = 0

    @property
    def whole(self) -> str:
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def add(self, piece: str) -> str:
        """The engine goes on with ``piece``: what of it is new to the client. Raises Diverged."""
        known = "" if self.at == self.length else self.whole[self.at : self.at + len(piece)]
        if not piece.startswith(known):
            raise Diverged("other text than before")
        self.at += len(piece)
        fresh = piece[len(known) :]
        if fresh:
            self._pieces.append(fresh)
            self.length += len(fresh)
        return fresh


class Transcript(LateReader):
    """A stream of one answer. ``ids_wanted``: the client asked for token ids; else they are taken out again.

    ``stop`` are its stop strings, of whose length the engine holds text back, unless they are ``in_output``.
    """

    def __init__(self, *, ids_wanted: bool, stop: Sequence[str] = (), in_output: bool = False) -> None:
        super().__init__()
        self._ids_wanted, self._stop = ids_wanted, [text for text in stop if text]
        self._held_back = 0 if in_output else max((len(text) - 1 for text in self._stop), default=0)
        self._frame: dict[str, Any] = {}
        self._prompt_raw = b""
        self._prompt_ids: list[int] = []
        self._ids: list[int] = []
        self._ids_at = self._from = 0
        self._texts: dict[Channel, _Text] = {_CONTENT: _Text()}
        # After which tokens all of their text was said: places to go on from.
        self._marks: deque[tuple[int, int]] = deque(maxlen=_MARKS_MAX)
        self._place = 0, 0
        self._parsed = self._speaks = self._usage_said = self._news = False

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's token ids, as the engine told them."""
        self._read()
        if self._prompt_raw and not self._prompt_ids:
            try:
                self._prompt_ids = msgspec.json.decode(self._prompt_raw, type=list[int])
            except msgspec.DecodeError:
                self._prompt_raw, self._blind = b"", True
        return self._prompt_ids

    @property
    def ids(self) -> list[int]:
        """The ids of the tokens that the client has."""
        self._read()
        return self._ids

    @property
    def progress(self) -> int:
        """How much the client has: tokens."""
        return len(self.ids)

    @property
    def continues(self) -> bool:
        """Whether the engine began in the middle."""
        return self._from > 0

    @property
    def plain(self) -> bool:
        """Whether all the client has is text as it was generated, nothing that a parser made of it."""
        self._read()
        return not self._parsed and list(self._texts) == [_CONTENT]

    def place(self) -> int:
        """The last token that another engine can go on behind, a count; 0: only from the prompt.

        There all text of the tokens before was said (no character is cut, which a detokeniser would keep to itself), and no stop string
        may have begun, which an engine that starts there could not see.
        """
        self._read()
        text = self._texts[_CONTENT]
        for tokens, said in reversed(self._marks):
            end = said + self._held_back
            if end <= text.length and tokens <= len(self._ids):
                before = text.whole[:end]
                if not before.endswith(_BROKEN_CHARACTER) and not any(_may_have_begun(before, stop) for stop in self._stop):
                    self._place = tokens, end
                    return tokens
        return 0

    def begin_again(self, tokens: int) -> None:
        """Another engine answers next, from behind the first ``tokens``: 0, or what ``place`` returned last."""
        self._read()
        self._rest, self._again, self._from, self._ids_at = b"", True, tokens, tokens
        for text in self._texts.values():
            text.at = 0
        if tokens:
            self._texts[_CONTENT].at = self._place[1]

    def feed(self, piece: bytes) -> bytes:
        """What the client gets of the next bytes, in whole events. Raises Diverged, EngineFailed."""
        whole, end = self._whole(piece)
        if not end:
            return b""
        if self._again:
            return self._now(whole)
        # First of all, since every other search would go through a prompt's ids, too.
        kept = self._without_prompt(whole)
        if _FAILS in kept or _SAYS_NOTHING in kept:
            return self._now(whole if self._ids_wanted else kept)
        self.done = self.done or kept.startswith(_DONE) or EVENT_END + _DONE in kept
        self._later(kept)
        if not self._ids_wanted:
            # Two searches for fixed bytes take a third of the expression's time, and mostly there is one event.
            whole = _ASKED_BY_US.sub(rb"\1null", kept) if EVENT_END in kept else _nulled(_nulled(kept, _IDS), _PROMPT_IDS)
        return whole + end

    def _without_prompt(self, whole: bytes) -> bytes:
        """What is to be read later. A prompt's ids stay as they came until somebody goes on from them: reading 128,000 takes 20 ms."""
        if self._prompt_raw or self._prompt_ids:
            return whole
        kept, self._prompt_raw = _cut(whole, _PROMPT_IDS)
        return kept

    def closing(self, *, with_usage: bool) -> bytes:
        """The end of an answer whose last token the client has, where the engine did not live to say it."""
        self._read()
        self.done = True
        said = b""
        if with_usage and not self._usage_said:
            prompt, completion = len(self.prompt_ids), len(self._ids)
            usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, "prompt_tokens_details": None}
            said = _encoded(self._frame | {"choices": [], "usage": usage})
        return said + _DONE + EVENT_END

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(_DATA) or event.startswith(_DONE):
            self.done = self.done or event.startswith(_DONE)
            return event + EVENT_END
        try:
            said = msgspec.json.decode(event[len(_DATA) :])
            return self._take(event, said)
        except (msgspec.DecodeError, ValueError, TypeError, AttributeError, LookupError):
            # No event that an engine is known to send: it passes, and nothing is built on it.
            self._blind = True
            return event + EVENT_END

    def _take(self, event: bytes, said: dict[str, Any]) -> bytes:
        if (error := said.get("error")) is not None:
            code = error.get("code")
            if isinstance(code, int) and code >= _SERVER_ERRORS_FROM:
                raise EngineFailed(str(error.get("message")))
            self._blind = True
            return event + EVENT_END
        if not self._frame:
            self._frame = {name: said[name] for name in ("id", "object", "created", "model") if name in said}
        self._usage_said = self._usage_said or (said.get("usage") is not None and not said["choices"])
        hidden = not self._ids_wanted and _is_for_ids_alone(said)
        news = self._note(said)
        if self._again:
            return self._rewritten(said) if news and not hidden else b""
        return b"" if hidden else self._as_asked(event, said) + EVENT_END

    def _note(self, said: dict[str, Any]) -> bool:
        """Writes an event down, and takes out of it what the client has. False where nothing is left."""
        if not said["choices"]:
            return True
        (choice,) = said["choices"]
        prompt = choice.pop("prompt_token_ids", None) or said.pop("prompt_token_ids", None)
        if prompt and not self._prompt_ids:
            self._prompt_ids = prompt
        ids, before = choice.get("token_ids"), self._ids_at
        choice["token_ids"] = fresh = self._fresh_ids(ids or [])
        delta = choice.get("delta")
        begins = delta is not None and delta.get("role") is not None
        self._parsed = self._parsed or delta == {}
        spoke = self._speak(choice if delta is None else delta)
        self._blind = self._blind or (ids is None and not begins)
        if before + 1 == self._ids_at and spoke:
            self._marks.append((self._ids_at, self._texts[_CONTENT].at))
        if choice.get("logprobs"):
            choice["logprobs"] = _last_logprobs(choice["logprobs"], len(fresh))
        ends = choice.get("finish_reason") is not None
        self._finish(ends)
        first, self._speaks = not self._speaks, self._speaks or begins
        return ends or bool(fresh) or self._news or (begins and first)

    def _finish(self, ends: bool) -> None:
        if not ends:
            return
        if self._ids_at < len(self._ids) or any(text.at < text.length for text in self._texts.values()):
            raise Diverged("it ends before what was sent")
        self._finished = True

    def _fresh_ids(self, ids: list[int]) -> list[int]:
        known = self._ids[self._ids_at : self._ids_at + len(ids)]
        if ids[: len(known)] != known:
            raise Diverged("other tokens than before")
        self._ids_at += len(ids)
        fresh = ids[len(known) :]
        self._ids += fresh
        return fresh

    def _speak(self, holder: dict[str, Any]) -> bool:
        """Cuts the texts of a choice or a delta down to what is new (``_news``). Whether it had plain text at all."""
        self._news = False
        spoke = False
        for name in ("text", *_TEXTS):
            if isinstance(piece := holder.get(name), str):
                channel = _CONTENT if name == "text" else (name, 0)
                spoke = spoke or (channel == _CONTENT and piece != "")
                if piece or channel == _CONTENT:
                    holder[name] = self._add(channel, piece)
        if calls := holder.get("tool_calls"):
            holder["tool_calls"] = [kept for call in calls if (kept := self._tool_call(call)) is not None]
            if not holder["tool_calls"]:
                del holder["tool_calls"]
        return spoke

    def _add(self, channel: Channel, piece: str) -> str:
        if self._from and channel != _CONTENT:
            raise Diverged("a parser speaks that did not before")
        fresh = self._texts.setdefault(channel, _Text()).add(piece)
        self._news = self._news or fresh != ""
        return fresh

    def _tool_call(self, call: dict[str, Any]) -> dict[str, Any] | None:
        """A piece of a call: whole where the client does not know the call yet, else only what is new (its id was drawn anew)."""
        index, function = call.get("index", 0), call.get("function") or {}
        known = ("name", index) in self._texts
        fresh = {part: self._add((part, index), function.get(part) or "") for part in ("name", "arguments")}
        if not known:
            self._news = True
            return call
        fresh = {part: piece for part, piece in fresh.items() if piece}
        return {"index": index, "function": fresh} if fresh else None

    def _rewritten(self, said: dict[str, Any]) -> bytes:
        """An event of another engine than the first one, as the first one would have sent it."""
        said |= {name: value for name, value in self._frame.items() if name in said}
        if isinstance(usage := said.get("usage"), dict):
            usage["prompt_tokens"] -= self._from
            usage["completion_tokens"] += self._from
        for choice in said["choices"]:
            if not self._ids_wanted:
                choice["token_ids"] = None
        return _encoded(said)

    def _as_asked(self, event: bytes, said: dict[str, Any]) -> bytes:
        """The engine's own bytes, without the ids that only the router asked for."""
        if self._ids_wanted or not said["choices"]:
            return event
        # Inside a JSON string its quotes would be escaped, so this is never in a text.
        return _nulled(_nulled(event, _IDS), _PROMPT_IDS)


def _is_for_ids_alone(said: dict[str, Any]) -> bool:
    """Whether a chat's event says nothing: vLLM sends it, for a token that its parser keeps, only to those who ask for ids."""
    choice = said["choices"][0] if said["choices"] else {}
    return choice.get("delta") == {} and choice.get("finish_reason") is None and not choice.get("logprobs")


def _may_have_begun(text: str, stop: str) -> bool:
    return any(text.endswith(stop[:length]) for length in range(1, len(stop)))


def _nulled(event: bytes, name: bytes) -> bytes:
    return _cut(event, name)[0]


def _cut(event: bytes, name: bytes) -> tuple[bytes, bytes]:
    """The event with null in place of the list of that name, and the list; the event as it is where there is none."""
    begin = event.find(name)
    end = event.find(b"]", begin)
    if begin < 0 or end < 0:
        return event, b""
    begin, end = begin + len(name) - 1, end + 1
    return event[:begin] + b"null" + event[end:], event[begin:end]


def _last_logprobs(logprobs: dict[str, Any], count: int) -> dict[str, Any]:
    """Of the lists with one item a token the last ``count``."""
    return {name: value[len(value) - count :] if isinstance(value, list) else value for name, value in logprobs.items()}


def _encoded(said: dict[str, Any]) -> bytes:
    return _DATA + msgspec.json.encode(said) + EVENT_END
