"""Clients that take their time, or send more than they may, over a bare socket."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest
from router_under_test import MakeEngine, RouterUnderTest
from tests_shared import Bus, wait_for

DRIP_SECONDS = 0.1


@pytest.fixture
def hasty(bus: Bus) -> Iterator[RouterUnderTest]:
    router = RouterUnderTest(bus, header_seconds_max=1, body_seconds_max=1, header_bytes_max=4096)
    yield router
    router.stop()


def connect(router: RouterUnderTest) -> socket.socket:
    return socket.create_connection(("127.0.0.1", router.port), timeout=DRIP_SECONDS)


def drip(client: socket.socket, text: bytes, seconds_max: float = 6.0) -> tuple[float, bytes]:
    """Sends byte by byte, over and over, until the router closes; after how long that was, and what it said."""
    started, said, number = time.monotonic(), b"", 0
    while time.monotonic() - started < seconds_max:
        try:
            client.sendall(text[number % len(text) :][:1])
            number += 1
            piece = client.recv(65536)
            if not piece:
                break
            said += piece
        except TimeoutError:
            continue
        except OSError:
            break
    else:
        pytest.fail(f"still open after {seconds_max} s; it said {said!r}")
    client.close()
    return time.monotonic() - started, said


def error(said: bytes) -> str:
    """The code of the last answer."""
    return str(json.loads(said.rpartition(b"\r\n\r\n")[2])["error"]["code"])


def test_headers_that_drip_are_cut_off(hasty: RouterUnderTest) -> None:
    seconds, said = drip(connect(hasty), b"GET /health HTTP/1.1\r\n" + b"x-header: value\r\n" * 1000)
    assert 0.8 < seconds < 2.5
    assert said.startswith(b"HTTP/1.1 408 ")
    assert error(said) == "headers_too_slow"


def test_a_connection_that_says_nothing_is_closed(hasty: RouterUnderTest) -> None:
    client = connect(hasty)
    client.settimeout(3)
    started = time.monotonic()
    assert b"headers_too_slow" in client.recv(65536)
    assert client.recv(65536) == b""
    assert time.monotonic() - started < 2.5


def test_line_ends_after_an_answer_keep_nothing_open(hasty: RouterUnderTest) -> None:
    client = connect(hasty)
    client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert drip(client, b"\r\n")[0] < 2.5


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3e8\r\n",
        b"POST /v1/nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n",
    ],
    ids=["length", "chunked", "unknown route", "route that reads no body"],
)
def test_bodies_that_drip_are_cut_off_whatever_was_answered(hasty: RouterUnderTest, head: bytes) -> None:
    client = connect(hasty)
    client.sendall(head)
    seconds, said = drip(client, b" ")
    assert 1.5 < seconds < 4
    assert said.startswith(b"HTTP/1.1 408 " if b"completions" in head else b"HTTP/1.1 ")
    if b"completions" in head:
        assert error(said) == "body_too_slow"
    wait_for(lambda: b"headstart_requests_in_flight 0.0" in hasty.get("/metrics")[1])


def test_a_long_answer_and_a_kept_connection_are_left_alone(make_engine: MakeEngine, hasty: RouterUnderTest) -> None:
    decode = make_engine("d", "decode")
    hasty.knows(1)
    client = socket.create_connection(("127.0.0.1", hasty.port), timeout=10)
    body = json.dumps({"model": "m", "prompt": "y"}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    for _ in range(2):
        decode.hold.clear()
        client.sendall(request)
        time.sleep(2.5)
        decode.hold.set()
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    # The next request comes while the one before it is being answered, and its body takes its time.
    decode.hold.clear()
    client.sendall(request + request[:-5])
    time.sleep(2.5)
    decode.hold.set()
    assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    client.close()


@pytest.mark.parametrize("whole", [True, False])
def test_headers_over_the_cap_are_431(hasty: RouterUnderTest, whole: bool) -> None:
    client = socket.create_connection(("127.0.0.1", hasty.port), timeout=5)
    client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: %s\r\n" % (b"b" * 50) * 100 + b"\r\n" * whole)
    said = client.recv(65536)
    assert said.startswith(b"HTTP/1.1 431 ")
    assert error(said) == "headers_too_large"
    assert client.recv(65536) == b""
    client.close()
    fits = socket.create_connection(("127.0.0.1", hasty.port), timeout=5)
    fits.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: %s\r\n" % (b"b" * 50) * 60 + b"\r\n")
    assert fits.recv(65536).startswith(b"HTTP/1.1 200 ")
    fits.close()


def test_what_is_no_http_is_400_in_the_usual_form(hasty: RouterUnderTest) -> None:
    client = socket.create_connection(("127.0.0.1", hasty.port), timeout=5)
    client.sendall(b"\x16\x03\x01 no http\r\n\r\n")
    said = client.recv(65536)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert error(said) == "invalid_http"
    client.close()


def test_a_body_that_comes_in_one_piece_with_its_headers_is_no_header(make_engine: MakeEngine, hasty: RouterUnderTest) -> None:
    make_engine("d", "decode")
    hasty.knows(1)
    body = json.dumps({"model": "m", "prompt": "x" * 20_000}).encode()
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as client:
        for _ in range(2):
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
