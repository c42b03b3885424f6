"""Choosing TCP ports for servers that are started a moment later."""

from __future__ import annotations

import random
import socket

from cachebus.errors import HeadstartError

# Below the range from which kernels take ports for outgoing connections: one of those
# would be in use again by the time the server that is to have it binds.
_CHOSEN_FROM = range(20_000, 32_000)
_TRIES = 200


def free_port(host: str, count: int = 1) -> int:
    """The first of ``count`` ports in a row of ``host`` that nobody listens on. Raises HeadstartError where there are none."""
    for first in random.sample(_CHOSEN_FROM, _TRIES):
        try:
            for port in range(first, first + count):
                _bind(host, port)
        except OSError:
            continue
        return first
    raise HeadstartError(f"found no free port of {host} between {_CHOSEN_FROM.start} and {_CHOSEN_FROM.stop}")


def check_free(setting: str, host: str, port: int) -> None:
    """Raises HeadstartError, naming the setting to change, where ``port`` of ``host`` can't be listened on."""
    try:
        _bind(host, port)
    except OSError as error:
        raise HeadstartError(f"{setting}: can't listen on {host}:{port}: {error.strerror}; choose another port, or 0 for a free one") from error


def told_host(host: str) -> str:
    """The address that others are told of a server that listens on ``host``: where that is every address, the one of this machine's own name.

    A container has its own address under its own name, so workers that are scaled or started again need no setting.
    Raises HeadstartError where the name has none.
    """
    address = host
    if host in ("0.0.0.0", "::"):
        name = socket.gethostname()
        try:
            address = str(socket.getaddrinfo(name, None, _family(host), socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            raise HeadstartError(f"listening on {host}, but this machine's name {name} has no address to tell others: give one instead") from error
    return f"[{address}]" if ":" in address else address


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _bind(host: str, port: int) -> None:
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
