"""vLLM's API server with the segment cache: ``python -m cachebus.engine.api_server SETTINGS ARGUMENTS``.

``SETTINGS`` are ``SegmentCacheSettings`` in JSON, ``ARGUMENTS`` are vLLM's own. A way of its own to start the server, instead of one of vLLM's
plugins: those are loaded in every vLLM of the environment.
"""

from __future__ import annotations

import runpy
import sys

import msgspec

from cachebus.engine.command import VLLM_SERVER
from cachebus.engine.segment_renderer import SegmentCacheSettings, use_segment_cache


def main() -> None:
    """Runs the server until it ends."""
    use_segment_cache(msgspec.json.decode(sys.argv.pop(1), type=SegmentCacheSettings))
    # Under the server's own name as the main module, so that processes which it spawns import what they would without this one.
    runpy.run_module(VLLM_SERVER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
