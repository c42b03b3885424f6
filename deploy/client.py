"""A client that measures: one streamed request, its headers, tokens and times."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from cachebus.errors import HeadstartError

_SECONDS_MAX = 1800


@dataclass
class Answer:
    """A whole answer. ``ttft_seconds`` counts to the first event that carries a token, ``total_seconds`` to the last byte."""

    headers: dict[str, str]
    ttft_seconds: float = 0.0
    total_seconds: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def cached_tokens(self) -> int:
        """What the body says of cached tokens."""
        return int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def ask(url: str, path: str, body: dict[str, Any], api_key: str = "") -> Answer:
    """Sends a request as a stream and reads it to the end. Raises HeadstartError where the answer is an error."""
    address = urlsplit(url)
    scheme = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = scheme(address.hostname or "", address.port, timeout=_SECONDS_MAX)
    request = json.dumps({"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True, **body})
    started = time.perf_counter()
    try:
        connection.request("POST", path, request, {"content-type": "application/json"} | ({"authorization": f"Bearer {api_key}"} if api_key else {}))
        response = connection.getresponse()
        answer = Answer({name.lower(): value for name, value in response.getheaders()})
        if response.status != 200:
            raise HeadstartError(f"{url}{path} answered {response.status}: {response.read(2000).decode(errors='replace')}")
        complete = False
        for line in response:
            if line.startswith(b"data: "):
                complete = line.startswith(b"data: [DONE]")
                if not complete:
                    _take(answer, json.loads(line[6:]), time.perf_counter() - started)
        answer.total_seconds = time.perf_counter() - started
        if not complete:
            raise HeadstartError(f"{url}{path}: the stream ended early")
        return answer
    except (OSError, http.client.HTTPException) as error:
        raise HeadstartError(f"{url}{path}: {str(error) or type(error).__name__}") from error
    finally:
        connection.close()


def _take(answer: Answer, event: dict[str, Any], seconds: float) -> None:
    if "error" in event:
        raise HeadstartError(f"the stream carried an error: {event['error']}")
    answer.usage = event.get("usage") or answer.usage
    for choice in event.get("choices", []):
        tokens = choice.get("token_ids") or []
        if tokens and not answer.token_ids:
            answer.ttft_seconds = seconds
        answer.token_ids += tokens
        answer.text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
