"""An engine without a server, in a process of its own: what a transfer costs, without HTTP, text and routing around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachebus.engine import process_tree
from cachebus.errors import HeadstartError

ANSWER = "headstart-answer "
"""What an answer of the process begins with: vLLM writes to the same pipe."""

_TAIL_LINES = 12


@dataclass(frozen=True)
class Asked:
    """An answer: seconds until it was whole, its tokens, and how many of the prompt's nobody computed."""

    seconds: float
    token_ids: list[int]
    cached: int


class OfflineEngine:
    """One vLLM engine; its other output goes to ``log``. ``options`` are those of ``vllm.LLM``. Raises HeadstartError where it ends."""

    def __init__(self, options: Mapping[str, Any], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self._log = log.open("ab")
        command = [sys.executable, "-m", "deploy.bench.offline_process"]
        self._process = process_tree.start(command, {**os.environ, **(environment or {})}, subprocess.PIPE, self._log, subprocess.PIPE)
        self._send(options)

    def ask(self, seed: int, tokens: int, answer: int = 1) -> Asked:
        """The answer to the prompt of that seed and length."""
        found = self._send({"seed": seed, "tokens": tokens, "answer": answer})
        return Asked(found["seconds"], found["token_ids"], found["cached"] or 0)

    def empty_hbm(self) -> None:
        """Empties vLLM's own prefix cache; a hit that follows comes from elsewhere."""
        if not self._send("empty")["empty"]:
            raise HeadstartError("vLLM did not empty its prefix cache: something still holds blocks")

    def stop(self) -> None:
        """Ends it with all its processes."""
        process_tree.kill_tree(self._process)
        self._log.close()

    def _send(self, command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        for line in self._process.stdout:
            if line.startswith(ANSWER.encode()):
                found: dict[str, Any] = json.loads(line.removeprefix(ANSWER.encode()))
                return found
            self._log.write(line)
        return self._fail()

    def _fail(self) -> dict[str, Any]:
        self._log.flush()
        lines = Path(self._log.name).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        raise HeadstartError("the engine ended:\n  " + "\n  ".join(lines))
