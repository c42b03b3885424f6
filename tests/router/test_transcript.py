"""Streams that die anywhere, any number of times, and are joined: the client has what it would have had."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from greedy_engine import GreedyEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from router.apis import CHAT, COMPLETIONS
from router.fields import DecodeRequest
from router.resume import next_leg, transcript_for, with_ids
from router.transcript import Diverged, EngineFailed, Transcript

PROMPT = [97, 98, 99]
IDS = {"return_token_ids": True}


@dataclass
class Seen:
    """What a client saw of a stream."""

    ids: list[int] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    ends: list[tuple[Any, Any]] = field(default_factory=list)
    usage: list[dict[str, Any]] = field(default_factory=list)
    frames: set[tuple[Any, ...]] = field(default_factory=set)
    roles: int = 0
    dones: int = 0


def seen(raw: bytes) -> Seen:
    found = Seen()
    for event in raw.split(b"\n\n")[:-1]:
        data = event.removeprefix(b"data: ")
        if data == b"[DONE]":
            found.dones += 1
            continue
        said = json.loads(data)
        assert not found.dones
        found.frames.add((said["id"], said["created"], said["model"], said["object"]))
        if said.get("usage"):
            found.usage.append({name: said["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")})
        for choice in said["choices"]:
            delta = choice.get("delta", {})
            found.roles += "role" in delta
            found.ids += choice.get("token_ids") or []
            for name in ("content", "reasoning"):
                if delta.get(name) or (name == "content" and choice.get("text")):
                    found.texts[name] = found.texts.get(name, "") + (delta.get(name) or choice["text"])
            if choice["finish_reason"] is not None:
                found.ends.append((choice["finish_reason"], choice["stop_reason"]))
    return found


def answered(engine: GreedyEngine, path: str, body: dict[str, Any], deaths: list[int]) -> tuple[bytes, list[int]]:
    """The whole stream as a client gets it, and how many tokens each resumption went on behind. ``deaths``: after how many bytes."""
    transcript = transcript_for(path, body)
    assert transcript is not None
    asked = with_ids(path, DecodeRequest(body, PROMPT))
    leg, out, places, from_prompt = asked, b"", [], False
    for number, death in enumerate([*deaths, None, None]):
        raw = b"".join(engine.events(leg.body | leg.added, list(leg.token_ids or ()), f"engine-{number}"))[:death]
        pieces = [raw[at : at + 100] for at in range(0, len(raw), 100)]
        try:
            for piece in pieces:
                out += transcript.feed(piece)
        except Diverged:
            assert transcript.continues
            from_prompt = True
        if transcript.done:
            break
        if transcript.finished:
            return out + transcript.closing(with_usage=True), places
        assert transcript.resumable
        leg = next_leg(path, asked, transcript, from_prompt=from_prompt, takes_ids=True)
        places.append(len(leg.token_ids or ()) - len(PROMPT))
    return out, places


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["completion", "chat", "thinking chat"]),
    stop=st.lists(st.sampled_from(["ab", "b a", "aba", "é a", "bb a", "漢"]), max_size=2),
    wants_ids=st.booleans(),
    cuts=st.lists(st.floats(0, 1), max_size=3),
    least=st.sampled_from([0, 5]),
)
def test_a_joined_stream_is_the_whole_stream(seed: int, kind: str, stop: list[str], wants_ids: bool, cuts: list[float], least: int) -> None:
    path = COMPLETIONS if kind == "completion" else CHAT
    body: dict[str, Any] = {"max_tokens": 60, "min_tokens": least, "temperature": 0, "stop": stop, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | ({"return_token_ids": True} if wants_ids else {})
    body |= {} if path == COMPLETIONS else {"messages": []}
    chance = random.Random(seed)
    engine = GreedyEngine(seed, chance, chat=path == CHAT, parser=kind == "thinking chat")
    plain = seen(b"".join(engine.events(body, PROMPT, "engine-0")))
    length = len(b"".join(engine.events(body | IDS, PROMPT, "engine-0")))
    joined = seen(answered(engine, path, body, [int(cut * length) for cut in cuts])[0])
    assert len(joined.frames) == 1, "id and created are those of one engine"
    joined.frames = plain.frames
    assert joined == plain


def test_what_can_be_continued_is_and_the_rest_is_computed_again() -> None:
    engine = GreedyEngine(7, random.Random(1))
    body = {"max_tokens": 400, "temperature": 0, "stream": True}
    raw = b"".join(engine.events(body | IDS, PROMPT, "engine-0"))
    places = answered(engine, COMPLETIONS, body, [len(raw) // 2, len(raw) // 3])[1]
    assert places[0] > 3
    assert places[1] > places[0]
    for stateful in ({"presence_penalty": 0.5}, {"response_format": {"type": "json_object"}}, {"bad_words": ["x y"]}, {"skip_special_tokens": False}):
        assert answered(engine, COMPLETIONS, body | stateful, [len(raw) // 2])[1] == [0]


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": None},
        {"temperature": 0.1},
        {"temperature": False},
        {"n": 2},
        {"stream": False},
        {"echo": True},
        {"use_beam_search": True},
        {"best_of": 3},
    ],
)
def test_nobody_goes_on_with_what_is_drawn_or_not_one_stream(change: dict[str, Any]) -> None:
    body = {"prompt": "x", "stream": True, "temperature": 0}
    assert transcript_for(COMPLETIONS, body) is not None
    assert transcript_for(COMPLETIONS, body | change) is None


@pytest.mark.parametrize(
    ("changed", "continued"),
    [
        ({}, True),
        ({"max_tokens": None}, False),
        ({"max_tokens": None, "max_completion_tokens": 60}, True),
        ({"tools": [{"type": "function"}]}, False),
        ({"logprobs": True, "top_logprobs": 2}, True),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, False),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, True),
        ({"takes_ids": False}, False),
    ],
)
def test_when_a_chat_is_continued(changed: dict[str, Any], continued: bool) -> None:
    takes_ids = changed.pop("takes_ids", True)
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "temperature": 0, "stream": True, **changed}
    transcript = transcript_for(CHAT, body)
    assert transcript is not None
    events = GreedyEngine(3, random.Random(0), chat=True).events({"max_tokens": 60} | IDS, PROMPT, "engine-0")
    for _ in range(9):
        transcript.feed(next(events))
    leg = next_leg(CHAT, DecodeRequest(body, PROMPT), transcript, from_prompt=False, takes_ids=takes_ids)
    assert (leg.body != body) is continued
    if continued:
        limit = "max_completion_tokens" if body["max_tokens"] is None else "max_tokens"
        assert leg.body[limit] == 60 - (len(leg.token_ids or ()) - len(PROMPT)) < 60


def event(**choice: Any) -> bytes:
    return b"data: " + json.dumps({"id": "i", "choices": [{"index": 0, "finish_reason": None, **choice}]}, separators=(",", ":")).encode() + b"\n\n"


@pytest.mark.parametrize(
    "again",
    [event(text="ax", token_ids=[1, 2]), event(text="a", token_ids=[3]), event(text="a", token_ids=[1], finish_reason="stop")],
)
def test_what_differs_is_never_joined(again: bytes) -> None:
    transcript = Transcript(ids_wanted=True)
    transcript.feed(event(text="a", token_ids=[1]) + event(text="b", token_ids=[2]))
    transcript.begin_again(0)
    with pytest.raises(Diverged):
        transcript.feed(again)


def test_a_parser_that_speaks_only_in_the_second_half_is_not_believed() -> None:
    transcript = Transcript(ids_wanted=True)
    transcript.feed(event(delta={"content": "a"}, token_ids=[1]))
    assert transcript.place() == 1
    transcript.begin_again(1)
    with pytest.raises(Diverged):
        transcript.feed(event(delta={"reasoning": "b"}, token_ids=[2]))


def test_a_tool_call_keeps_its_first_id_and_gets_only_new_arguments() -> None:
    def called(name: str, *pieces: str) -> bytes:
        first = event(delta={"tool_calls": [{"index": 0, "id": name, "type": "function", "function": {"name": "f", "arguments": ""}}]}, token_ids=[1])
        deltas = [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in pieces]
        return first + b"".join(event(delta=delta, token_ids=[2 + n]) for n, delta in enumerate(deltas))

    transcript = Transcript(ids_wanted=False)
    transcript.feed(called("first", '{"x', '":'))
    transcript.begin_again(0)
    (said,) = transcript.feed(called("second", '{"x', '": 1}')).split(b"\n\n")[:-1]
    assert b"second" not in said
    assert json.loads(said[6:])["choices"][0]["delta"] == {"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]}


@pytest.mark.parametrize("wanted", [True, False])
def test_a_long_prompt_is_read_only_where_somebody_goes_on_from_it(wanted: bool) -> None:
    transcript = Transcript(ids_wanted=wanted)
    raw = event(text="a", prompt_token_ids=[9] * 100_000, token_ids=[7])
    assert transcript.feed(raw) == (raw if wanted else event(text="a", prompt_token_ids=None, token_ids=None))
    assert transcript._unread_bytes < 200
    assert transcript.feed(event(text="b", token_ids=[8])) == event(text="b", token_ids=[8] if wanted else None)
    assert (transcript.ids, transcript.prompt_ids) == ([7, 8], [9] * 100_000)


def test_bytes_stay_as_the_engine_sent_them_but_for_the_ids() -> None:
    transcript = Transcript(ids_wanted=False)
    choice = b'{"index":0,"text":"\\"token_ids\\":[1] \xc3\xa9","logprobs":null,"prompt_token_ids":[9,8],"token_ids":[7]}'
    raw = b'data: {"id":"i","choices":[' + choice + b"]}\n\n: x\n\n"
    assert b"".join(transcript.feed(raw[n : n + 1]) for n in range(len(raw))) == raw.replace(b"[9,8]", b"null").replace(b"[7]", b"null")
    assert (transcript.ids, transcript.prompt_ids) == ([7], [9, 8])
    assert transcript.feed(event(delta={}, token_ids=[3])) == b"", "what was sent for its ids alone"


def test_an_engine_that_says_it_failed_is_dead_and_one_without_ids_is_not_resumed() -> None:
    transcript = Transcript(ids_wanted=False)
    with pytest.raises(EngineFailed):
        transcript.feed(b'data: {"error":{"message":"EngineCore is dead","code":500}}\n\n')
    assert transcript.resumable
    transcript.feed(event(text="a"))
    assert not transcript.resumable
