"""Errors as the clients of each API expect them."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from router.apis import RESPONSES, is_anthropic

_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's names; any other status is invalid_request_error or api_error."""


class ApiError(Exception):
    """An answer that is an error: an HTTP status, a message for the client, and the field at fault where there is one."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None, retry_seconds: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_seconds = retry_seconds

    def body(self, path: str = "") -> bytes:
        """The error object as the API of ``path`` has it, JSON."""
        if is_anthropic(path):
            return _anthropic(self.status, str(self))
        kind = "not_found_error" if self.status == 404 else "invalid_request_error" if self.status < 500 else "server_error"
        return msgspec.json.encode({"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}})

    def event(self, path: str, number: int) -> bytes:
        """How a stream of the API of ``path``, of which ``number`` events were sent, tells it."""
        if path == RESPONSES:
            said = {"type": "error", "code": self.code, "message": str(self), "param": self.param, "sequence_number": number}
            return b"event: error\ndata: " + msgspec.json.encode(said) + b"\n\n"
        return (b"event: error\n" if is_anthropic(path) else b"") + b"data: " + self.body(path) + b"\n\n"

    def response(self, headers: dict[str, str], path: str = "") -> Response:
        """The whole answer."""
        if self.retry_seconds:
            headers = {**headers, "retry-after": str(self.retry_seconds)}
        return Response(self.body(path), self.status, headers, "application/json")


class _Said(msgspec.Struct):
    message: str


class _EngineRefusal(msgspec.Struct):
    error: _Said


def said(body: bytes) -> str | None:
    """What an engine says in a refusal; None where it is in no API's form."""
    try:
        return msgspec.json.decode(body, type=_EngineRefusal).error.message
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def refusal(status: int, body: bytes, path: str) -> bytes:
    """An engine's refusal in the form of the API of ``path``: vLLM has OpenAI's, and names of its own, for some refusals of every API."""
    message = said(body)
    if is_anthropic(path):
        return _anthropic(status, body.decode("utf-8", "replace") if message is None else message)
    return body if message is not None else ApiError(status, body.decode("utf-8", "replace"), code="engine_refused").body()


def _anthropic(status: int, message: str) -> bytes:
    kind = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}})
