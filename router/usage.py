"""What the router reads and changes in an answer: its usage says what the headers say, every other byte stays as the engine sent it."""

from __future__ import annotations

from typing import Any

import msgspec

EVENT_END = b"\n\n"
_DATA = b"data: "
_USAGE = b'"usage":{'


_SERVER_ERRORS_FROM = 500


class _EngineError(msgspec.Struct):
    code: Any = None


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
        if _USAGE not in event or not event.startswith(_DATA):
            return event
        try:
            chunk = msgspec.json.decode(event[len(_DATA) :])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return event
        if not isinstance(chunk, dict):
            return event
        _correct(chunk, self._cached_tokens)
        return _DATA + msgspec.json.encode(chunk)


def is_engine_failure(events: bytes) -> bool:
    """Whether a stream's first event is an error that is the engine's own fault (code 5xx), not the request's."""
    event = events.partition(EVENT_END)[0]
    if not event.startswith(_DATA):
        return False
    try:
        error = msgspec.json.decode(event[len(_DATA) :], type=_ErrorEvent).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return error is not None and isinstance(error.code, int) and error.code >= _SERVER_ERRORS_FROM


def _correct(answer: dict[str, Any], cached_tokens: int) -> None:
    usage = answer.get("usage")
    if isinstance(usage, dict):
        usage["prompt_tokens_details"] = {**(usage.get("prompt_tokens_details") or {}), "cached_tokens": cached_tokens}
