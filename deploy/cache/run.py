"""``headstart cache``: hands the command over to the action that was asked for."""

from __future__ import annotations

import argparse

from deploy.cache import exporting, importing, show, warm
from deploy.settings import Settings

_OTHERS = {"warm": warm.run, "export": exporting.run, "import": importing.run}


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Runs one action and returns its exit code. Raises HeadstartError where it can't begin."""
    return _OTHERS.get(options.action, show.run)(settings, options)
