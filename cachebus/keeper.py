"""Notices a daemon's restart, for a process that is otherwise silent: a ping each second from a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from cachebus.client import BusClient
from cachebus.errors import BusError, BusUnavailable
from cachebus.holder import Holder
from cachebus.messages import Ping, Pong, Request

log = logging.getLogger("headstart.keeper")

PING_SECONDS = 1.0
_ANSWER_MS_MAX = 2000


class Keeper(threading.Thread):
    """Sends ``announce()`` to every daemon that was not told yet, the one of ``epoch`` being told already.

    ``connected`` says whether the last ping was answered. A refusal is logged and tried again.
    """

    def __init__(self, run_dir: Path, name: str, holder: Holder, announce: Callable[[], Request], epoch: int = -1) -> None:
        super().__init__(name="headstart-keeper", daemon=True)
        self.connected = epoch >= 0
        self._run_dir, self._label, self._holder = run_dir, name, holder
        self._announce = announce
        self._epoch = epoch
        self._ending = threading.Event()

    def stop(self) -> None:
        """Ends the thread."""
        self._ending.set()
        self.join(timeout=_ANSWER_MS_MAX / 1000 + 1)

    def run(self) -> None:
        client = BusClient(self._run_dir, self._label, self._holder)
        while not self._ending.wait(PING_SECONDS):
            try:
                self._ping(client)
            except BusUnavailable:
                if self.connected:
                    log.warning("%s: the cachebus does not answer; requests go on without it", self._label)
                self.connected = False
            except BusError as error:
                log.error("%s: %s", self._label, error)
        client.close()

    def _ping(self, client: BusClient) -> None:
        pong = client.call(Ping(self._holder.id), _ANSWER_MS_MAX)
        if isinstance(pong, Pong) and pong.epoch != self._epoch:
            client.call(self._announce(), _ANSWER_MS_MAX)
            if self._epoch >= 0:
                log.info("%s: announced to a new cachebus", self._label)
            self._epoch = pong.epoch
        self.connected = True
