import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachebus.codec import PROTOCOL_VERSION, decode_events, decode_reply, decode_request, encode_events, encode_reply, encode_request
from cachebus.errors import ProtocolError
from cachebus.messages import Acquire, Granted, Reattach, Stored
from cachebus.messages_routers import Claim, Exchange, Exchanged, Spent, TellLoads


def test_messages_survive_the_wire() -> None:
    request = Acquire("h", b"l", [b"k" * 32], 5)
    assert decode_request(encode_request(7, request)).body == request
    assert decode_request(encode_request(7, Reattach("h", {5: [0, 4096]}, [1]))).body == Reattach("h", {5: [0, 4096]}, [1])
    assert decode_reply(encode_reply(7, Granted(0, []))).ticket == 7
    batch = decode_events(encode_events(3, 4, [Stored([b"k"])]))
    assert (batch.epoch, batch.seq, batch.events) == (3, 4, [Stored([b"k"])])


def test_another_version_is_refused_by_number() -> None:
    frame = msgspec.msgpack.encode([PROTOCOL_VERSION + 1, 1, ["Ping", ""]])
    with pytest.raises(ProtocolError, match=str(PROTOCOL_VERSION + 1)):
        decode_request(frame)


@given(st.binary(max_size=200))
def test_noise_is_refused_and_nothing_else_happens(noise: bytes) -> None:
    for decode in (decode_request, decode_reply, decode_events):
        with pytest.raises(ProtocolError):
            decode(noise)


@given(st.integers(0, 40), st.integers(1, 255))
def test_a_damaged_message_decodes_or_is_refused(place: int, flip: int) -> None:
    frame = bytearray(encode_request(7, Acquire("holder", b"l" * 16, [b"k" * 32], 5)))
    frame[place % len(frame)] ^= flip
    try:
        decode_request(bytes(frame))
    except ProtocolError:
        pass


SPENT = Spent(1, 2, 3, 4, 5)


@given(
    st.sampled_from([Claim("r", 1, [b"k" * 32], 1.0, b"k" * 32), TellLoads("r", {}, {"t": SPENT}), Exchange(["r"], {"r": {"t": SPENT}}, True)]),
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_what_routers_and_their_buses_say_decodes_or_is_refused_when_damaged(
    said: Claim | TellLoads | Exchange, damage: list[tuple[int, int]]
) -> None:
    frame = bytearray(encode_request(7, said))
    for place, flip in damage:
        frame[place % len(frame)] ^= flip
    try:
        decode_request(bytes(frame))
    except ProtocolError:
        pass


@pytest.mark.parametrize("count", [-1, 1 << 53, 1 << 63, 0.5, None, "1"])
def test_counts_that_can_not_be_do_not_decode(count: object) -> None:
    entry = ["Spent", 0, count, 0, 0, 0]
    with pytest.raises(ProtocolError):
        decode_request(msgspec.msgpack.encode([PROTOCOL_VERSION, 1, ["Exchange", [], {"r": {"t": entry}}, True]]))
    with pytest.raises(ProtocolError):
        decode_reply(msgspec.msgpack.encode([PROTOCOL_VERSION, 1, ["Exchanged", {"r": {"t": entry}}]]))
    assert decode_reply(encode_reply(1, Exchanged({"r": {"t": SPENT}}))).body == Exchanged({"r": {"t": SPENT}})
