"""The shell blocks of compose/README.md, and which of them the tests run."""

from __future__ import annotations

import re

from containers import ROOT

PAGE = (ROOT / "compose" / "README.md").read_text()


def blocks_of(page: str) -> list[str]:
    """The shell blocks of a Markdown page."""
    return re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def not_executed(block: str) -> bool:
    """Whether its first line says that nobody runs it here, with a reason."""
    return bool(re.match(r"# not executed (here|by the tests): \S.{10,}\n", block))


def executed(page: str) -> list[str]:
    """The blocks that the tests run."""
    return [block for block in blocks_of(page) if not not_executed(block)]
