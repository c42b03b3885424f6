"""Plain vLLM with the same model and flags: what Headstart's answers and times are compared with."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cachebus.engine import process_tree
from cachebus.engine.command import engine_environment, plain_command
from cachebus.errors import HeadstartError
from cachebus.settings import ModelSettings, WorkerSettings

_POLL_SECONDS = 0.2
_TAIL_LINES = 12


class PlainEngine:
    """One vLLM API server; its output goes to ``log``. ``arguments`` and ``environment`` add to the usual ones."""

    def __init__(
        self, model: ModelSettings, pool: WorkerSettings, log: Path, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind((pool.host, 0))
            port = probe.getsockname()[1]
        self.url = f"http://{pool.host}:{port}"
        self._command = [*plain_command(model, pool, port), *arguments]
        self._environment = {**engine_environment(pool, os.environ), **(environment or {})}
        self._log = log
        self._seconds_max = pool.start_seconds_max

    def start(self, progress: Callable[[str], None]) -> None:
        """Returns when it serves. Raises HeadstartError where it does not."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as out:
            self._process = process_tree.start(self._command, self._environment, stdout=out, stderr=subprocess.STDOUT)
        started = told = time.monotonic()
        while not self._healthy():
            now = time.monotonic()
            if self._process.poll() is not None or now - started > self._seconds_max:
                self.stop()
                lines = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
                raise HeadstartError("plain vLLM did not start:\n  " + "\n  ".join(lines))
            if now - told > 1:
                told = now
                progress(f"starting plain vLLM, {now - started:.0f} s")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Ends it with all its processes."""
        process_tree.kill_tree(self._process)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False
