import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from router.usage import EventPatcher, patch_json

STREAM = (
    b'data: {"choices":[{"delta":{"content":"say \\"usage\\":{ and data: [DONE]"}}]}\n\n'
    b": comment\n\n"
    b'data: {"choices":[],"usage":{"prompt_tokens":5,"prompt_tokens_details":null}}\n\n'
    b'data: {"choices":[{"text":"x"}],"usage":{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":4,"more":1}}}\n\n'
    b"data: [DONE]\n\n"
)


def patched(pieces: list[bytes]) -> bytes:
    patcher = EventPatcher(3)
    return b"".join(patcher.feed(piece) for piece in pieces) + patcher.flush()


def test_usage_is_corrected_and_nothing_else_changes() -> None:
    events = patched([STREAM]).split(b"\n\n")
    before = STREAM.split(b"\n\n")
    assert [a == b for a, b in zip(events, before, strict=True)] == [True, True, False, False, True, True]
    for event, kept in ((events[2], {}), (events[3], {"more": 1})):
        assert json.loads(event[6:])["usage"]["prompt_tokens_details"] == {"cached_tokens": 3, **kept}


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_cuts_anywhere_change_nothing(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    assert patched([STREAM[a:b] for a, b in itertools.pairwise(places)]) == patched([STREAM])


def test_a_stream_that_ends_in_the_middle_keeps_its_last_bytes() -> None:
    assert patched([b"data: 1\n\ndata: 2"]) == b"data: 1\n\ndata: 2"


def test_answers_that_are_no_objects_pass() -> None:
    for raw in (b"", b"[]", b"not json", b"\xff"):
        assert patch_json(raw, 3) == raw
    assert json.loads(patch_json(b'{"usage":{"prompt_tokens":1},"kv_transfer_params":{"a":1}}', 3)) == {
        "usage": {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 3}},
        "kv_transfer_params": None,
    }
