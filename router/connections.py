"""A client's connection: uvicorn's protocol, with an end to how long headers and a body may take, and to how large headers may be.

Uvicorn itself closes a connection on which nothing comes; one that drips a byte now and then it keeps, and headers it takes without limit.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from router.errors import ApiError
from router.settings import RouterSettings

_GRACE_SECONDS = 1.0
"""The endpoint answers a late body in words first."""
_FIELD_BYTES = 4
"""Colon, blank and line end of a header."""


class Connection(HttpToolsProtocol):
    """See the module. ``protocol`` makes a class of it that knows the settings."""

    settings: RouterSettings

    _in_headers = True
    _saw_headers = False
    _header_bytes = 0
    _timer: asyncio.TimerHandle | None = None
    _refusal: ApiError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._timer is None and self._in_headers:
            self._begin_headers()
        began_before, self._saw_headers = self._in_headers, False
        super().data_received(data)
        # What a body, or the whole of a small request, came along with is not all headers.
        if self.transport.is_closing() or not began_before or self._saw_headers:
            return
        self._header_bytes += len(data)
        if self._header_bytes > self.settings.header_bytes_max:
            self._refuse(self._too_large())

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + _FIELD_BYTES for name, value in self.headers)
        if size > self.settings.header_bytes_max:
            self._refusal = self._too_large()
            raise ValueError("the headers are too large")
        self._in_headers, self._saw_headers = False, True
        self._start_timer(self.settings.body_seconds_max + _GRACE_SECONDS)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_timer()
        self._in_headers = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no request that this server takes, and closes the connection."""
        self._refuse(self._refusal or ApiError(400, msg, code="invalid_http"))

    def _begin_headers(self) -> None:
        self._header_bytes = 0
        self._start_timer(self.settings.header_seconds_max)

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.pipeline or (answering and self._in_headers):
            # Another request came before the answer to the one before it: that may take as long as it takes.
            self._start_timer(self.settings.header_seconds_max)
        elif self._in_headers:
            text = f"the request's headers did not come within {self.settings.header_seconds_max} s (router.header_seconds_max)"
            self._refuse(ApiError(408, text, code="headers_too_slow"))
        else:
            # Whoever does not read would keep a connection that waits until all is written.
            self.transport.abort()

    def _too_large(self) -> ApiError:
        text = f"the request's headers are larger than the {self.settings.header_bytes_max} bytes of router.header_bytes_max"
        return ApiError(431, text, code="headers_too_large")

    def _refuse(self, error: ApiError) -> None:
        if self.transport.is_closing():
            return
        body = error.body()
        head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()


def protocol(settings: RouterSettings) -> type[asyncio.Protocol]:
    """The protocol class for uvicorn's ``http``."""
    made: Any = type("RouterConnection", (Connection,), {"settings": settings})
    return cast(type[asyncio.Protocol], made)
