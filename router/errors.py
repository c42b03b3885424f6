"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

import msgspec
from starlette.responses import Response


class ApiError(Exception):
    """An answer that is an error: an HTTP status, a message for the client, and the field at fault where there is one."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None, retry_seconds: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_seconds = retry_seconds

    def body(self) -> bytes:
        """The error object, JSON."""
        kind = "not_found_error" if self.status == 404 else "invalid_request_error" if self.status < 500 else "server_error"
        return msgspec.json.encode({"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}})

    def response(self, headers: dict[str, str]) -> Response:
        """The whole answer."""
        if self.retry_seconds:
            headers = {**headers, "retry-after": str(self.retry_seconds)}
        return Response(self.body(), self.status, headers, "application/json")
