"""Streams of messages, cut anywhere and said again in other pieces: the client has every character once, or hears that it can't."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from router.message_transcript import MessageTranscript
from router.resume import transcript_for
from router.transcript import Diverged, EngineFailed

FIELDS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"), "tool_use": ("input_json_delta", "partial_json")}
Blocks = list[tuple[str, str]]


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def stream(blocks: Blocks, chance: random.Random) -> list[bytes]:
    """What an engine says, in pieces of its own."""
    events = [event("message_start", message={"id": f"m{chance.random()}", "usage": {"input_tokens": 1}})]
    for index, (kind, text) in enumerate(blocks):
        block = {"type": kind, "id": f"t{chance.random()}", "name": "f"} if kind == "tool_use" else {"type": kind}
        events.append(event("content_block_start", index=index, content_block=block))
        delta, field = FIELDS[kind]
        start = 0
        while start < len(text):
            end = start + chance.randint(1, 4)
            events.append(event("content_block_delta", index=index, delta={"type": delta, field: text[start:end]}))
            start = end
        if kind == "thinking":
            events.append(event("content_block_delta", index=index, delta={"type": "signature_delta", "signature": str(chance.random())}))
        events.append(event("content_block_stop", index=index))
    return [*events, event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 9}), event("message_stop")]


def read(raw: bytes) -> tuple[Blocks, list[str]]:
    """What a client makes of it, strictly; and the events' names."""
    blocks: list[list[str]] = []
    opened, names = -1, []
    for one in raw.decode().removesuffix("\n\n").split("\n\n"):
        name, data = one.split("\n")
        said = json.loads(data.removeprefix("data: "))
        names.append(name.removeprefix("event: "))
        if said["type"] == "content_block_start":
            assert (opened, said["index"]) == (-1, len(blocks))
            opened = said["index"]
            blocks.append([said["content_block"]["type"], ""])
        elif said["type"] == "content_block_delta":
            assert said["index"] == opened
            if said["delta"]["type"] != "signature_delta":
                blocks[opened][1] += said["delta"][FIELDS[blocks[opened][0]][1]]
        elif said["type"] == "content_block_stop":
            assert said["index"] == opened
            opened = -1
    return [(kind, text) for kind, text in blocks], names


BLOCKS: Blocks = [("thinking", "so it is said"), ("text", "a reply of some words"), ("tool_use", '{"a":1}'), ("text", "end")]


@pytest.mark.parametrize("seed", range(300))
def test_cut_anywhere_twice_every_character_comes_once(seed: int) -> None:
    chance = random.Random(seed)
    transcript, sent = MessageTranscript(), b""
    for last in (False, False, True):
        raw = b"".join(stream(BLOCKS, chance))
        rest = raw if last else raw[: chance.randrange(len(raw))]
        while rest:
            size = chance.randint(1, 200)
            sent += transcript.feed(rest[:size])
            rest = rest[size:]
        if transcript.done:
            break
        if transcript.finished:
            sent += transcript.closing(with_usage=False)
            break
        assert transcript.resumable
        if not last:
            transcript.begin_again()
    blocks, names = read(sent)
    assert blocks == BLOCKS
    assert [names.count(name) for name in ("message_start", "message_delta", "message_stop")] == [1, 1, 1]
    assert names.count("content_block_start") == names.count("content_block_stop") == len(BLOCKS)
    assert transcript.done


@pytest.mark.parametrize(
    "other",
    [
        [("thinking", "so it was said"), *BLOCKS[1:]],
        [("text", "so it is said"), *BLOCKS[1:]],
        [("thinking", "so it is"), *BLOCKS[1:]],
        [("thinking", "so it is said again"), *BLOCKS[1:]],
        BLOCKS[:1],
    ],
)
def test_what_differs_is_found_out(other: Blocks) -> None:
    chance = random.Random(5)
    transcript = MessageTranscript()
    for said in stream(BLOCKS, chance)[:-6]:
        transcript.feed(said)
    transcript.begin_again()
    with pytest.raises(Diverged):
        for said in stream(other, chance):
            transcript.feed(said)


def test_an_engine_that_fails_says_so_and_what_is_unknown_is_not_built_on() -> None:
    transcript = MessageTranscript()
    transcript.feed(event("message_start", message={}))
    with pytest.raises(EngineFailed):
        transcript.feed(event("error", error={"type": "internal_error", "message": "dead"}))
    assert transcript.resumable
    assert transcript.feed(event("novelty")) == event("novelty")
    assert not transcript.resumable


def test_only_greedy_streams_are_written_down() -> None:
    assert isinstance(transcript_for("/v1/messages", {"stream": True, "temperature": 0}), MessageTranscript)
    for body in ({"stream": True}, {"stream": True, "temperature": 0.1}, {"temperature": 0}, {"stream": True, "temperature": False}):
        assert transcript_for("/v1/messages", body) is None
