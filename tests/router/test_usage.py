import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from router.usage import EventPatcher, counted, is_engine_failure, patch_json

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


def test_anthropics_usage_counts_cached_tokens_beside_the_others() -> None:
    right = {"input_tokens": 7, "output_tokens": 1, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 0}
    for told in ({"input_tokens": 10}, {"input_tokens": 2, "cache_read_input_tokens": 8}, {"input_tokens": 2, "cache_creation_input_tokens": 8}):
        assert json.loads(patch_json(json.dumps({"usage": told | {"output_tokens": 1}}).encode(), 3))["usage"] == right
    start = b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":10,"output_tokens":1}}}'
    (event, rest) = patched([start + b"\n\n"]).split(b"\n\n")
    assert (event.split(b"\n")[0], rest) == (b"event: message_start", b"")
    assert json.loads(event.split(b"\ndata: ")[1])["message"]["usage"] == right


def test_what_a_usage_counts_is_found_behind_all_that_was_said() -> None:
    assert counted(b'data: {"choices":[{"text":"\\"usage\\":{"}],"usage":null}') is None
    assert counted(b'{"usage":{"prompt_tokens":9,"total_tokens":11,"completion_tokens":2}}') == (9, 2)
    said = b'{"content":[{"input":{"prompt_tokens":1,"usage":{"prompt_tokens":2}}}],'
    assert counted(said + b'"usage":{"input_tokens":3,"output_tokens":4,"cache_read_input_tokens":5,"cache_creation_input_tokens":null}}') == (8, 4)
    assert counted(b'{"response":{"usage":{"input_tokens":8,"output_tokens":4,"total_tokens":12}}}') == (8, 4)


def test_failures_of_the_engine_are_told_from_refusals_in_both_forms() -> None:
    for kind, failed in (("internal_error", True), ("invalid_request_error", False)):
        event = b'event: error\ndata: {"type":"error","error":{"type":"%s","message":"m"}}\n\n' % kind.encode()
        assert is_engine_failure(event) is failed
    for code, failed in ((500, True), (400, False)):
        assert is_engine_failure(b'data: {"error":{"message":"m","code":%d}}\n\n' % code) is failed
    assert not is_engine_failure(b'event: message_start\ndata: {"type":"message_start"}\n\n')
