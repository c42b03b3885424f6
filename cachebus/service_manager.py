"""Tells systemd that a role is ready (sd_notify(3)), so that who waits for it goes on then, and not before."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping

log = logging.getLogger("headstart")

NOTIFY_SOCKET = "NOTIFY_SOCKET"


def tell_ready(environ: Mapping[str, str]) -> None:
    """Does nothing where no service manager listens."""
    address = environ.get(NOTIFY_SOCKET, "")
    if not address:
        return
    # "@" stands for the zero byte of an abstract socket.
    place = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as telling:
        try:
            telling.sendto(b"READY=1", place)
        except OSError as error:
            log.warning("can't tell the service manager at %s: %s", address, error.strerror)
