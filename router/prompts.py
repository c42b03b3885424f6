"""Whose prompt the cache can be asked for: one whose KV is named by its token ids, which the engine renders as it serves them. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from router.apis import COMPLETIONS, MESSAGES, RESPONSES
from router.fields import is_splittable

_TEXTUAL = (
    *("text", "refusal", "thinking", "redacted_thinking", "tool_use", "tool_result", "tool_reference", "tool_addition", "tool_removal"),
    *("input_text", "output_text", "summary_text", "reasoning_text"),
)
"""Types of the parts of a message that its text says whole."""
_ITEMS = (None, "message", "reasoning", "function_call", "function_call_output")
"""Such items of a response's input."""


def is_cacheable(path: str, body: dict[str, Any]) -> bool:
    """Whether the request is such a one.

    What is more than text (images, sound) has KV of its own. Where an Anthropic message disables thinking vLLM asks the chat template for less of
    it by a word that its renderer does not look up. Tools that the engine itself runs make prompts that nobody renders ahead.
    """
    if not is_splittable(path, body):
        return False
    if path == COMPLETIONS:
        return True
    if path == RESPONSES:
        tools, items = body.get("tools"), body.get("input")
        own = all(isinstance(tool, dict) and tool.get("type") == "function" for tool in tools) if isinstance(tools, list) else not tools
        return own and body.get("previous_input_messages") is None and (isinstance(items, str) or _are_text(items, _ITEMS))
    thinking = body.get("thinking")
    if path == MESSAGES and isinstance(thinking, dict) and thinking.get("type") == "disabled":
        return False
    return _are_text(body.get("messages"), (None, "message"))


def _are_text(messages: Any, kinds: tuple[str | None, ...]) -> bool:
    """Whether messages, of these ``kinds``, are text, calls of tools and their results alone; what is no list of messages the engine refuses."""
    held = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    if any(message.get("type") not in kinds for message in held):
        return False
    while held:
        held = list(_parts(held))
        if any(part.get("type") not in _TEXTUAL for part in held):
            return False
    return True


def _parts(holders: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for holder in holders:
        for name in ("content", "output", "summary"):
            inner = holder.get(name)
            if isinstance(inner, list):
                yield from (part for part in inner if isinstance(part, dict))
