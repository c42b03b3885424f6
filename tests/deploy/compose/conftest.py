"""Containers for the tests of compose/: simulated workers where `worker-cpu` would be, or real ones from this environment."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from compose_page import PAGE, executed
from containers import Engine, build, engine

_TAG = "0.1.0"
_ENVIRONMENT = """ENV HEADSTART_PREFILL_PORT=8000 HEADSTART_PREFILL_COUNT=1 HEADSTART_DECODE_PORT=8000 HEADSTART_DECODE_COUNT=1 \\
  XDG_CACHE_HOME=/var/cache/headstart
"""
"""As the worker's stage of the Dockerfile has it."""
_PROFILE = 'model = "headstart-demo"\nblocks = 2000\nmax_model_len = 16384\n'


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Images as the page builds them, with simulated workers in the image of the workers; nothing started."""
    folder = tmp_path_factory.mktemp("simulated")
    with engine(folder) as made:
        _images(made, folder, "exec headstart sim --role $1 --port 8000 --profile /profile.toml", {"profile.toml": _PROFILE})
        yield made


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The same with real workers: this environment's vLLM, mounted, in place of one that is installed in four minutes."""
    folder = tmp_path_factory.mktemp("real")
    # Not at their own places, which may lie in a home that only its owner may enter.
    places = {sys.base_prefix: "python", sysconfig.get_path("purelib"): "site", str(folder / "headstart"): "source"}
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    script = (
        "export LD_LIBRARY_PATH=/engine/python/lib PYTHONHOME=/engine/python PYTHONPATH=/engine/source:/engine/site\n"
        f"exec /engine/python/bin/{version} -m deploy $1"
    )
    with engine(folder, [f"{place}:/engine/{name}:ro" for place, name in places.items()]) as made:
        _images(made, folder, script, {})
        yield made


def _images(made: Engine, folder: Path, script: str, files: dict[str, str]) -> None:
    builds, secrets = executed(PAGE)[:2]
    made.run(builds)
    made.run(secrets)
    copies = "".join(f"COPY {file} /{file}\n" for file in ("entry.sh", *files))
    dockerfile = f'FROM localhost/headstart/router:{_TAG}\n{copies}{_ENVIRONMENT}ENTRYPOINT ["sh", "/entry.sh"]\n'
    build(made, folder / "worker", f"localhost/headstart/worker-cpu:{_TAG}", dockerfile, **{"entry.sh": script + "\n"}, **files)
