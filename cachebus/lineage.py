"""Whether engines can still read what is held: what each model's last engine registered, kept beside the chunks over restarts.

Keys are hashes over the namespace, so from a chunk nobody can tell whose it is. The file says what is being served; who comes with something else
reads nothing of before, and people should hear of that from a log instead of a hit rate.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from cachebus.messages import RegisterEngine

log = logging.getLogger("headstart.cachebus")

_FILE = "engines.json"


class _Last(msgspec.Struct, frozen=True):
    namespace: bytes
    layout: bytes
    parts: dict[str, str]


class Lineage:
    """The last engine of every model. ``folder`` is where the chunks that outlive a restart lie."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._last: dict[str, _Last] = {}
        self._said: set[str] = set()
        try:
            self._last = msgspec.json.decode(self._path.read_bytes(), type=dict[str, _Last])
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("%s can't be read, so nobody knows whether chunks of before fit: %s", self._path, error)

    def register(self, engine: RegisterEngine, held: int) -> None:
        """Takes an engine in that was admitted, with ``held`` chunks there, and logs how it goes with what was before."""
        before, now = self._last.get(engine.model), _Last(engine.namespace, engine.layout, engine.namespace_parts | engine.layout_parts)
        if before is None or (before.namespace, before.layout) == (now.namespace, now.layout):
            if before is not None and engine.model not in self._said:
                log.info("%s serves %r as before: it can read what is held, %d chunks of all models", engine.worker, engine.model, held)
        else:
            differing = sorted(name for name in {*before.parts, *now.parts} if before.parts.get(name) != now.parts.get(name))
            what = "; ".join(f"{name} was {before.parts.get(name, 'absent')} and is {now.parts.get(name, 'absent')}" for name in differing)
            text = "%s serves %r otherwise than before, so nothing that was kept of it is read again (%d chunks of all models are held): %s"
            log.warning(text, engine.worker, engine.model, held, what or "its namespace")
        self._said.add(engine.model)
        if before != now:
            self._last[engine.model] = now
            self._write()

    def _write(self) -> None:
        new = self._path.with_name(f".{_FILE}.new")
        try:
            new.write_bytes(msgspec.json.encode(self._last))
            new.replace(self._path)
        except OSError as error:
            log.warning("%s can't be written, so after a restart nobody knows whether chunks of before fit: %s", self._path, error)
