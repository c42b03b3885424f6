"""A redis-server of a test's own."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import redis

from cachebus.ports import free_port


class RedisServer:
    """Runs until ``stop``; ``kill`` and ``start`` make it come back empty on the same port."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port("127.0.0.1")
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder, self._options = folder, options
        self.start()

    def start(self) -> None:
        program = shutil.which("redis-server")
        assert program, "these tests need redis-server: `apt-get install redis-server` (make setup does it where it may)"
        command = [program, "--port", str(self.port), "--save", "", "--dir", str(self._folder), "--loglevel", "warning", *self._options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.client = self.make_client()
        try:
            self._await()
        except BaseException:
            self.stop()
            raise

    def make_client(self) -> redis.Redis:
        """redis-py's own client, for looking in."""
        return redis.Redis(port=self.port, socket_timeout=5, password=self._password())

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.client.close()
        self.kill()

    def _await(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                self.client.ping()
                return
            except redis.ConnectionError:
                assert time.monotonic() < deadline, "redis-server does not start"
                time.sleep(0.02)

    def _password(self) -> str | None:
        options = list(self._options)
        return options[options.index("--requirepass") + 1] if "--requirepass" in options else None
