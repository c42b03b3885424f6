"""The shell blocks of a page for newcomers, and which of them the tests run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_EXECUTED = re.compile(r"# not executed here: \S.{10,}\n")


def blocks_of(page: str) -> list[str]:
    """Every block of commands, in order."""
    return _BLOCK.findall(page)


def is_executed(block: str) -> bool:
    """Whether its first line does not say why it is not."""
    return _NOT_EXECUTED.match(block) is None


def execute(page: str, folder: Path) -> None:
    """Runs all blocks that are to be, in ``folder``, with the commands of this interpreter's environment first."""
    bin_folder = Path(sys.executable).parent
    for block in filter(is_executed, blocks_of(page)):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=folder,
            env={**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
