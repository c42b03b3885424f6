"""OpenAI's responses at a simulated engine, as vLLM has them: a chat by another name. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from deploy.sim.answers import Answer
from deploy.sim.fields import Refused

_SAME = ("model", "stream", "temperature", "tools", "stop", "kv_transfer_params", "cache_salt")


def as_chat(body: Any) -> dict[str, Any]:
    """The chat that a request stands for. Raises Refused."""
    if not isinstance(body, dict) or not isinstance(body.get("input"), str | list):
        raise Refused("a response needs input, a text or a list")
    given = body["input"]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else [_message(item) for item in given]
    told = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
    return {name: body[name] for name in _SAME if name in body} | {"messages": told + items, "max_tokens": body.get("max_output_tokens")}


def _message(item: Any) -> dict[str, Any]:
    content = item.get("content") if isinstance(item, dict) else None
    if isinstance(content, list):
        content = [{"type": "text", "text": part.get("text")} if isinstance(part, dict) else part for part in content]
    if not isinstance(item, dict) or not isinstance(item.get("role"), str) or content is None:
        raise Refused("an item of input needs a role and content")
    return {"role": item["role"], "content": content}


@dataclass
class ResponseAnswer(Answer):
    """An answer in the form of responses: one item, a message of text."""

    _numbered: int = field(default=0)
    _opened: bool = field(default=False)

    def first_event(self) -> bytes:
        """What a stream begins with, before anything is computed."""
        return b"".join(self._told(f"response.{name}", response=self._response("in_progress", [])) for name in ("created", "in_progress"))

    def event(self, tokens: Sequence[int]) -> bytes:
        """A stream's next tokens."""
        begin = b""
        if not self._opened:
            self._opened = True
            begin = self._told("response.output_item.added", output_index=0, item=self._item("in_progress", ""))
        _, text = self.take(tokens)
        said = self._told("response.output_text.delta", output_index=0, content_index=0, item_id="msg_0", delta=text, logprobs=[]) if text else b""
        return begin + said

    def last_events(self) -> bytes:
        """What a stream ends with."""
        item = self._item("completed", self.text)
        done = self._told("response.output_item.done", output_index=0, item=item)
        return done + self._told("response.completed", response=self._response("completed", [item]))

    def whole(self) -> bytes:
        """The answer that is no stream."""
        return msgspec.json.encode(self._response("completed", [self._item("completed", self.text)]))

    def _item(self, status: str, text: str) -> dict[str, Any]:
        content = [{"type": "output_text", "text": text, "annotations": []}]
        return {"id": "msg_0", "type": "message", "role": "assistant", "status": status, "content": content}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        found = {"id": self.request_id, "object": "response", "created_at": self.created, "model": self.model, "status": status, "output": output}
        return found | {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "usage": self._used() if output else None}

    def _used(self) -> dict[str, Any]:
        prompt, completion = len(self.asked.prompt), len(self.token_ids)
        details = {"input_tokens_details": {"cached_tokens": self.cached_tokens}, "output_tokens_details": {"reasoning_tokens": 0}}
        return {"input_tokens": prompt, "output_tokens": completion, "total_tokens": prompt + completion} | details

    def _told(self, kind: str, **fields: Any) -> bytes:
        number, self._numbered = self._numbered, self._numbered + 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, "sequence_number": number} | fields))
