"""Messages as bytes: msgpack arrays under one protocol version.

A request travels with a ticket of its client's, a reply with the ticket of its request. Events travel in batches,
numbered without gaps within one ``epoch`` (one life of a daemon).
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from cachebus.errors import ProtocolError
from cachebus.messages import Event, Reply, Request

PROTOCOL_VERSION = 2


class RequestEnvelope(msgspec.Struct, frozen=True, array_like=True):
    """A request with its protocol version and its client's ticket."""

    version: int
    ticket: int
    body: Request


class ReplyEnvelope(msgspec.Struct, frozen=True, array_like=True):
    """A reply with the ticket of its request."""

    version: int
    ticket: int
    body: Reply


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    """Events ``seq`` (the batch's number). A batch without events is a heartbeat and repeats the last number."""

    version: int
    epoch: int
    seq: int
    events: list[Event]


_Framed = TypeVar("_Framed", RequestEnvelope, ReplyEnvelope, EventBatch)

_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(RequestEnvelope)
_reply_decoder = msgspec.msgpack.Decoder(ReplyEnvelope)
_batch_decoder = msgspec.msgpack.Decoder(EventBatch)


def encode_request(ticket: int, body: Request) -> bytes:
    """Packs a request."""
    return _encoder.encode(RequestEnvelope(PROTOCOL_VERSION, ticket, body))


def encode_reply(ticket: int, body: Reply) -> bytes:
    """Packs a reply."""
    return _encoder.encode(ReplyEnvelope(PROTOCOL_VERSION, ticket, body))


def encode_events(epoch: int, seq: int, events: list[Event]) -> bytes:
    """Packs a batch of events."""
    return _encoder.encode(EventBatch(PROTOCOL_VERSION, epoch, seq, events))


def decode_request(frame: bytes | memoryview) -> RequestEnvelope:
    """Unpacks a request. Raises ProtocolError."""
    return _checked(_request_decoder, frame)


def decode_reply(frame: bytes | memoryview) -> ReplyEnvelope:
    """Unpacks a reply. Raises ProtocolError."""
    return _checked(_reply_decoder, frame)


def decode_events(frame: bytes | memoryview) -> EventBatch:
    """Unpacks a batch of events. Raises ProtocolError."""
    return _checked(_batch_decoder, frame)


def _checked(decoder: msgspec.msgpack.Decoder[_Framed], frame: bytes | memoryview) -> _Framed:
    try:
        message = decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a message that does not decode: {error}") from error
    if message.version != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {message.version}; this side speaks {PROTOCOL_VERSION}: run one release of Headstart everywhere")
    return message
