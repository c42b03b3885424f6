"""Where a request goes follows from what workers registered: nothing that a client sends can name another place."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from router_under_test import MakeEngine, RouterUnderTest

HEADERS = (
    *("host", "forwarded", "x-forwarded-host", "x-forwarded-for", "x-original-url", "x-rewrite-url", "x-upstream", "referer", "origin"),
    *("x-headstart-worker", "x-headstart-url", "x-headstart-route", "x-request-id", "x-prefill-url", "x-prefiller-host-port", "x-data-parallel-host"),
)
FIELDS = ("url", "worker", "base_url", "prefill_url", "remote_host", "prefiller", "decode_worker", "bootstrap_host", "user")
REFUSED = ("kv_transfer_params", "ec_transfer_params", "cache_salt")


@pytest.fixture
def stranger() -> Iterator[socket.socket]:
    """A place that is no worker's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        yield listener


def test_only_registered_workers_are_ever_asked(make_engine: MakeEngine, router: RouterUnderTest, stranger: socket.socket) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    place = f"127.0.0.1:{stranger.getsockname()[1]}"
    for number, value in enumerate((place, f"http://{place}", f"http://{place}/v1/completions")):
        body = {"model": "m", "prompt": f"{number}" + "x" * 1100, **dict.fromkeys(FIELDS, value)}
        status, headers, _ = router.post(body, headers=dict.fromkeys(HEADERS, value))
        assert (status, headers["x-headstart-worker"]) == (200, "d")
        sent = {**prefill.headers[number], **decode.headers[number]}
        assert place not in "".join(text for name, text in sent.items() if name != "host")
        assert place not in json.dumps(prefill.bodies[number])
        for field in REFUSED:
            assert router.post({"model": "m", "prompt": "y", field: {"remote_host": value}})[0] == 400
    assert len(decode.bodies) == 3
    with pytest.raises(TimeoutError):
        stranger.accept()


@pytest.mark.parametrize("line", ["POST http://{}/v1/completions", "CONNECT {}", "GET http://{}/health", "POST //{}/v1/completions"])
def test_nor_does_the_request_line(make_engine: MakeEngine, router: RouterUnderTest, stranger: socket.socket, line: str) -> None:
    make_engine("d", "decode")
    router.knows(1)
    place = f"127.0.0.1:{stranger.getsockname()[1]}"
    with socket.create_connection(("127.0.0.1", router.port), timeout=5) as client:
        body = json.dumps({"model": "m", "prompt": "y"})
        client.sendall(f"{line.format(place)} HTTP/1.1\r\nhost: {place}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        assert client.recv(65536).startswith(b"HTTP/1.1 ")
    with pytest.raises(TimeoutError):
        stranger.accept()
