from __future__ import annotations

import socket
from pathlib import Path

import pytest
from tests_shared import has_ipv6

from cachebus import ports
from cachebus.errors import HeadstartError
from cachebus.ports import check_free, free_port, told_host

HOST = "127.0.0.1"


def test_a_free_port_can_be_listened_on_and_no_outgoing_connection_takes_it() -> None:
    port = free_port(HOST)
    socket.create_server((HOST, port)).close()
    ephemeral_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert port < ephemeral_from


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_addresses_of_the_other_family_are_looked_at_too() -> None:
    taken = socket.create_server(("::1", free_port("::1")), family=socket.AF_INET6)
    with taken, pytest.raises(HeadstartError, match="Address already in use"):
        check_free("decode.port", "::1", taken.getsockname()[1])


def test_ports_in_use_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((HOST, free_port(HOST))) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "_CHOSEN_FROM", range(port, port + 1))
        monkeypatch.setattr(ports, "_TRIES", 1)
        with pytest.raises(HeadstartError, match="found no free port"):
            free_port(HOST)


def test_ports_in_a_row_are_all_free() -> None:
    first = free_port(HOST, 3)
    with socket.create_server((HOST, first + 2)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ports, "_CHOSEN_FROM", range(first, first + 1))
        patch.setattr(ports, "_TRIES", 1)
        assert free_port(HOST, 2) == first
        with pytest.raises(HeadstartError, match="found no free port"):
            free_port(HOST, 3)


def test_the_refusal_names_the_setting() -> None:
    with socket.create_server((HOST, free_port(HOST))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HeadstartError, match=rf"decode\.port: can't listen on {HOST}:{port}: Address already in use; choose another port"):
            check_free("decode.port", HOST, port)
    check_free("decode.port", HOST, port)


def test_who_listens_everywhere_tells_the_address_of_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told_host("10.0.0.7") == "10.0.0.7"
    assert told_host("fd00::9") == "[fd00::9]"
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert told_host("0.0.0.0") == "127.0.0.1"
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-name.invalid")
    with pytest.raises(HeadstartError, match=r"this machine's name no-such-name\.invalid has no address"):
        told_host("0.0.0.0")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::7", 0, 0, 0))])
    assert told_host("::") == "[fd00::7]"
