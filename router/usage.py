"""What the router reads and changes in an answer: its usage says what the headers say, every other byte stays as the engine sent it."""

from __future__ import annotations

import re
from typing import Any

import msgspec

EVENT_END = b"\n\n"
_DATA, _EVENT = b"data: ", b"event: "
_USAGE = b'"usage":{'
_HOLDERS = ("message", "response")
"""Where events of streams have what a whole answer has at its top."""
_PARTS = ("cache_read_input_tokens", "cache_creation_input_tokens")
"""What Anthropic's input_tokens leaves out of a prompt."""
_COUNTS = re.compile(rb'"(prompt_tokens|completion_tokens|input_tokens|output_tokens|cache_(?:read|creation)_input_tokens|total_tokens)":(\d{1,12})')

_ERROR_BYTES_MAX = 64 << 10
_SERVER_ERRORS_FROM = 500
_SERVER_ERRORS = ("internal_error", "api_error", "overloaded_error", "timeout_error")


class _EngineError(msgspec.Struct):
    code: Any = None
    type: Any = None


class _ErrorEvent(msgspec.Struct):
    error: _EngineError | None = None


def patch_json(raw: bytes, cached_tokens: int) -> bytes:
    """A whole JSON answer with its usage corrected; what is not a JSON object comes back as it was."""
    try:
        answer = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return raw
    if not isinstance(answer, dict):
        return raw
    _correct(answer, cached_tokens)
    if answer.get("kv_transfer_params") is not None:
        answer["kv_transfer_params"] = None
    return msgspec.json.encode(answer)


class EventPatcher:
    """The same for a stream of server-sent events, which may come in pieces cut anywhere."""

    def __init__(self, cached_tokens: int) -> None:
        self._cached_tokens = cached_tokens
        self._rest = b""

    def feed(self, piece: bytes) -> bytes:
        """The events that are whole by now."""
        whole, end, self._rest = (self._rest + piece).rpartition(EVENT_END)
        if not end:
            return b""
        if _USAGE not in whole:
            return whole + end
        return b"".join(self._event(event) + EVENT_END for event in whole.split(EVENT_END))

    def flush(self) -> bytes:
        """What is left when the stream ends in the middle of an event."""
        rest, self._rest = self._rest, b""
        return rest

    def _event(self, event: bytes) -> bytes:
        head, data = parted(event)
        if _USAGE not in event or not data:
            return event
        try:
            chunk = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return event
        if not isinstance(chunk, dict):
            return event
        _correct(chunk, self._cached_tokens)
        return head + msgspec.json.encode(chunk)


def events_in(piece: bytes) -> int:
    """How many events end in a piece. Counted from its first line break on: an event with a prompt's ids is one line of 600 KB."""
    start = piece.find(b"\n")
    return piece.count(EVENT_END, start) if start >= 0 else 0


def parted(event: bytes) -> tuple[bytes, bytes]:
    """An event's beginning, its name included where it has one, and its data; no data where it is of another kind."""
    start = event.index(b"\n") + 1 if event.startswith(_EVENT) and b"\n" in event else 0
    if not event.startswith(_DATA, start):
        return event, b""
    return event[: start + len(_DATA)], event[start + len(_DATA) :]


def counted(body: bytes) -> tuple[int, int] | None:
    """The tokens of prompt and answer that the usage in a piece of an answer tells of, the last one where there are several."""
    # It stands behind all that a model may have said, a tool's input too, which is an object in some answers.
    start = body.rfind(_USAGE)
    if start < 0:
        return None
    found = {name: int(value) for name, value in _COUNTS.findall(body, start)}
    if b"prompt_tokens" in found:
        return found[b"prompt_tokens"], found.get(b"completion_tokens", 0)
    total = found.get(b"input_tokens", 0)
    if b"total_tokens" not in found:
        total += sum(found.get(part.encode(), 0) for part in _PARTS)
    return total, found.get(b"output_tokens", 0)


def is_engine_failure(events: bytes) -> bool:
    """Whether a stream's first event is an error that is the engine's own fault (code 5xx), not the request's."""
    end = events.find(EVENT_END, 0, _ERROR_BYTES_MAX)
    if end < 0 and len(events) > _ERROR_BYTES_MAX:
        # An event with a prompt's ids is so long, no error is.
        return False
    try:
        error = msgspec.json.decode(parted(events[:end] if end >= 0 else events)[1], type=_ErrorEvent).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    if error is None:
        return False
    return error.type in _SERVER_ERRORS or (isinstance(error.code, int) and error.code >= _SERVER_ERRORS_FROM)


def _correct(answer: dict[str, Any], cached_tokens: int) -> None:
    """Each API has its own usage: OpenAI's counts cached tokens among those of the prompt, Anthropic's beside them."""
    for holder in (answer, *(answer.get(name) for name in _HOLDERS)):
        usage = holder.get("usage") if isinstance(holder, dict) else None
        if not isinstance(usage, dict):
            continue
        if "prompt_tokens" in usage:
            usage["prompt_tokens_details"] = {**(usage.get("prompt_tokens_details") or {}), "cached_tokens": cached_tokens}
        elif "total_tokens" in usage:
            usage["input_tokens_details"] = {**(usage.get("input_tokens_details") or {}), "cached_tokens": cached_tokens}
        elif "input_tokens" in usage:
            prompt = usage["input_tokens"] + sum(usage.pop(part, None) or 0 for part in _PARTS)
            usage |= {"input_tokens": prompt - cached_tokens, "cache_read_input_tokens": cached_tokens, "cache_creation_input_tokens": 0}
