"""The APIs that are spoken, by their paths."""

from __future__ import annotations

COMPLETIONS, CHAT, MESSAGES, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"
GENERATING = (CHAT, COMPLETIONS, MESSAGES, RESPONSES)
"""What generates: these prompts are looked up in the cache and routed by it."""
EMBEDDINGS = "/v1/embeddings"
ASKING = (EMBEDDINGS, "/v1/messages/count_tokens", "/tokenize", "/detokenize")
"""What any worker of the model answers without KV: these requests go on as they come."""


def is_anthropic(path: str) -> bool:
    """Whether the path is one of Anthropic's API; every other one has OpenAI's forms."""
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")
