"""A headless Chromium that looks at a page for some seconds of its own time."""

from __future__ import annotations

import html
import re
import subprocess
from pathlib import Path

_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars")
SECONDS_MAX = 60


def dom(url: str, profile: Path, *, milliseconds: int = 3000, width: int = 1200) -> str:
    """The page's elements as they are after a while, as HTML. ``profile`` is an empty folder."""
    options = (*_OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},900", f"--virtual-time-budget={milliseconds}")
    done = subprocess.run(["chromium", *options, "--dump-dom", url], capture_output=True, timeout=SECONDS_MAX, check=True)
    return done.stdout.decode()


def part(page: str, name: str) -> str:
    """The text that the element with that id shows."""
    found = re.search(rf'<(\w+)[^>]* id="{name}"[^>]*>', page)
    assert found is not None, f"no element is called {name}"
    depth, start = 1, found.end()
    for tag in re.finditer(rf"<(/?){found[1]}\b[^>]*>", page[start:]):
        depth += -1 if tag[1] else 1
        if depth == 0:
            return _text(page[start : start + tag.start()])
    raise AssertionError(f"{name} has no end")


def _text(markup: str) -> str:
    """Text without tags, a space between any two pieces."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def is_hidden(page: str, name: str) -> bool:
    """Whether the element with that id is hidden."""
    found = re.search(rf'<[^>]* id="{name}"[^>]*>', page)
    assert found is not None, f"no element is called {name}"
    return " hidden" in found[0]
