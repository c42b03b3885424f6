"""An engine's streams as vLLM writes them, from a rule instead of a model: what is known of detokenisers, stop strings and parsers.

Characters come in the bytes of their UTF-8, a token each, through the detokeniser that vLLM uses (tokenizers' DecodeStream).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream

BYTES = 256
WORDS = ["aa", "bb", "ab", "ba", " a", "b "]
CHARACTERS = [byte for letter in "é漢ü" for byte in letter.encode()]
END, THINKS = BYTES + len(WORDS), BYTES + len(WORDS) + 1
"""The token that ends an answer, and the one that ends its thoughts; neither has a text."""


def tokenizer() -> Tokenizer:
    """Byte-level, as most of today's: a byte that is no printable character stands as another one, in GPT-2's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelt = {byte: chr(byte) for byte in printable}
    spelt |= {byte: chr(BYTES + number) for number, byte in enumerate(byte for byte in range(BYTES) if byte not in printable)}
    vocabulary = {letter: byte for byte, letter in spelt.items()}
    vocabulary |= {"".join(spelt[byte] for byte in word.encode()): BYTES + number for number, word in enumerate(WORDS) if len(word) > 1}
    made = Tokenizer(models.WordLevel(vocabulary | {"<end>": END, "<thinks>": THINKS}, unk_token="<end>"))
    made.add_special_tokens(["<end>", "<thinks>"])
    made.decoder = decoders.ByteLevel()
    return made


TOKENIZER = tokenizer()


@dataclass
class Said:
    """What a step of the engine says."""

    tokens: list[int]
    text: str
    finish: str | None
    stop: str | None


@dataclass
class GreedyEngine:
    """One answer's engine. ``chance`` decides how many tokens come in an event; ``parser``: it has one for thoughts."""

    seed: int
    chance: random.Random
    chat: bool = False
    parser: bool = False

    def next_token(self, ids: Sequence[int]) -> int:
        digest = hashlib.blake2b(f"{self.seed} {list(ids)}".encode()).digest()
        if digest[0] < 4:
            return END
        if self.parser and digest[0] < 60:
            return THINKS
        if digest[0] < 150 and ids[-1] in (0xC3, 0xE6, 0xBC):
            # What completes a character, mostly.
            return {0xC3: 0xA9, 0xE6: 0xBC, 0xBC: 0xA2}[ids[-1]]
        choices = [*range(BYTES, BYTES + len(WORDS)), *b"ab ", *CHARACTERS]
        return choices[digest[1] % len(choices)]

    def events(self, body: dict[str, Any], prompt: list[int], name: str) -> Iterator[bytes]:
        """The stream that answers ``body`` with a prompt of these ids; ``name`` is its id."""
        frame = {"id": name, "object": "chunk", "created": int(name[-1]), "model": "m"}
        if self.chat:
            first = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]}
            yield _event(frame | first | {"prompt_token_ids": prompt if body.get("return_token_ids") else None})
        ids, thinking, count = prompt, self.parser, 0
        for said in self._steps(body, prompt):
            first_tokens, count = not count, count + len(said.tokens)
            choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": said.finish, "stop_reason": said.stop}
            choice["token_ids"] = said.tokens if body.get("return_token_ids") else None
            if self.chat:
                delta: dict[str, Any] = {"content": said.text}
                if self.parser:
                    delta = {"reasoning" if thinking else "content": said.text} if said.text else {}
                    thinking = thinking and THINKS not in said.tokens
                if self.parser and not delta and said.finish is None and not body.get("return_token_ids"):
                    continue
                choice["delta"] = delta
            else:
                choice["text"] = said.text
                choice["prompt_token_ids"] = prompt if first_tokens and body.get("return_token_ids") else None
            yield _event(frame | {"choices": [choice]})
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": len(ids), "completion_tokens": count, "total_tokens": len(ids) + count}
            yield _event(frame | {"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    def _steps(self, body: dict[str, Any], prompt: list[int]) -> Iterator[Said]:
        stops, limit = body.get("stop") or [], body["max_tokens"]
        held_back = max((len(stop) - 1 for stop in stops), default=0)
        stream = DecodeStream(ids=prompt, skip_special_tokens=True)
        ids, text, said, found = list(prompt), "", 0, None
        pending: list[int] = []
        group = self._group()
        while True:
            token = self.next_token(ids)
            ids.append(token)
            pending.append(token)
            before = len(text)
            if token != END:
                text += stream.step(TOKENIZER, token) or ""
            places = [(place, stop) for stop in stops if (place := text.find(stop, max(0, before - len(stop) + 1))) >= 0]
            if places and len(ids) - len(prompt) > body.get("min_tokens", 0):
                place, found = min(places)
                text = text[:place]
            over = token == END or found is not None
            finish = "stop" if over else "length" if len(ids) - len(prompt) == limit else None
            if finish or len(pending) == group or self.parser:
                end = len(text) if finish else max(said, len(text) - held_back)
                yield Said(pending, text[said:end], finish, found)
                said, pending, group = max(said, end), [], self._group()
            if finish:
                return

    def _group(self) -> int:
        return self.chance.choice([1, 1, 1, 2, 5])


def _event(said: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
