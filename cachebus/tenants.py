"""The file of tenants: who may ask, under which keys and limits, and who shares a cache.

One section a tenant, by its name. Of a key it holds the SHA-256 alone: keys are long and random, so nobody finds one by its hash. A tenant's
``cache_salt`` is derived from its name and the cluster's digest key, so all routers and daemons of a cluster agree on it without being told.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from cachebus.errors import SettingsError
from cachebus.keys import tenant_id
from cachebus.settings_file import Problem, Section, load_named, negative

log = logging.getLogger("headstart.tenants")

LOOK_SECONDS = 1.0
"""How long a change of the file may go unnoticed."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_NO_NAME = "can't name a tenant: letters, digits, '.', '_' and '-', at most 63"
_HASH = re.compile(r"[0-9a-f]{64}")
_KEY_BYTES = 32
_SALT = b"headstart tenant salt 1"


class Tenant(Section, frozen=True):
    """One tenant."""

    keys: list[str] = []  # noqa: RUF012 - msgspec gives each its own
    """SHA-256 of each of its keys, in hexadecimal; several, so that a key can be changed without a pause"""
    group: str = ""
    """Tenants of one group use each other's cache; empty: a cache of its own"""
    requests_per_minute: int = 0
    """Requests in a minute, as many at once where none came before; 0: no limit"""
    tokens_per_minute: int = 0
    """Tokens of prompts and answers in a minute; 0: no limit"""
    cache_share_max: float = 1.0
    """Share of a node's DRAM, of its NVMe tier, and of the shared tier that the tenant's chunks may take; of a group counts the largest"""
    priority_max: int = 0
    """Highest x-headstart-priority that its requests may have"""
    admin: bool = False
    """Its keys open the admin routes, too"""

    def problems(self) -> list[Problem]:
        found = negative(self, "requests_per_minute", "tokens_per_minute")
        found += [("keys", f"number {n} is no SHA-256 in hexadecimal; `headstart keys tenant` makes a key") for n, k in _numbered(self.keys)]
        if not 0 < self.cache_share_max <= 1:
            found.append(("cache_share_max", f"{self.cache_share_max} is no share; give more than 0 and at most 1"))
        return found


class Owner(NamedTuple):
    """``tenant`` names the owner of chunks on the bus; ``others`` are the tenants who share them."""

    tenant: bytes
    others: tuple[str, ...]


class Tenants:
    """The tenants of one reading of the file. ``digest_key``: the cluster's."""

    def __init__(self, named: Mapping[str, Tenant], digest_key: bytes) -> None:
        self.named = named
        self._digest_key = digest_key
        self.salts = {name: salt(digest_key, name, tenant) for name, tenant in named.items()}
        self._hashes = [(bytes.fromhex(key), name) for name, tenant in named.items() for key in tenant.keys]

    def of_key(self, key: bytes) -> str | None:
        """Whose key it is; every known one is compared, in constant time, whether one matched already or not."""
        given, found = hashlib.sha256(key).digest(), None
        for known, name in self._hashes:
            if hmac.compare_digest(known, given):
                found = name
        return found

    def owner(self, name: str) -> Owner:
        """Whose chunks a tenant's are; one that is not in the file (any more) owned what it had under its own name."""
        own = self.salts.get(name) or salt(self._digest_key, name, Tenant())
        return Owner(tenant_id(own), tuple(other for other, theirs in self.salts.items() if theirs == own and other != name))

    def shares(self) -> dict[bytes, float]:
        """What share of a tier each may take, by ``cachebus.keys.tenant_id``."""
        found: dict[bytes, float] = {}
        for name, tenant in self.named.items():
            owner = tenant_id(self.salts[name])
            found[owner] = max(tenant.cache_share_max, found.get(owner, 0.0))
        return found


class TenantsFile:
    """The file as it is: read again when it changes. Raises SettingsError where it can't be read at first.

    One that is broken later is named in the log, without what it holds, and the tenants as they were stay in force.
    """

    def __init__(self, path: Path, digest_key: bytes) -> None:
        self._path, self._digest_key = path, digest_key
        self._seen = _signature(path)
        self._looked_at = time.monotonic()
        self.now = Tenants(read_tenants(path), digest_key)
        """The tenants by the last ``look``."""

    def look(self) -> bool:
        """Looks whether the file has changed, once a second at most; True where others are in force now."""
        if time.monotonic() - self._looked_at < LOOK_SECONDS:
            return False
        self._looked_at = time.monotonic()
        seen = _signature(self._path)
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            self.now = Tenants(read_tenants(self._path), self._digest_key)
        except SettingsError as error:
            log.error("security.tenants_file: %s; the tenants as they were stay in force", error)
            return False
        log.info("%s was read again: %d tenants", self._path, len(self.now.named))
        return True


def salt(digest_key: bytes, name: str, tenant: Tenant) -> str:
    """The tenant's cache_salt: HMAC-SHA256 over its name, or its group's."""
    owner = f"group {tenant.group}" if tenant.group else f"tenant {name}"
    return hmac.new(digest_key, _SALT + owner.encode(), hashlib.sha256).hexdigest()


def read_tenants(path: Path) -> dict[str, Tenant]:
    """The tenants of a file. Raises SettingsError with every problem, by line."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"security.tenants_file: can't read {path}: {getattr(error, 'strerror', None) or 'it is no UTF-8 text'}") from error
    return _checked(load_named(Tenant, text, str(path)), path)


def add_key(path: Path, name: str) -> str:
    """Makes a key for a tenant, who is new or gets one more, and writes its hash into the file. Raises SettingsError.

    Everything else in the file stays as it is written, comments too.
    """
    if not _NAME.fullmatch(name):
        raise SettingsError(f"{name!r} {_NO_NAME}")
    key = f"hs-{secrets.token_urlsafe(_KEY_BYTES)}"
    text = path.read_text("utf-8") if path.exists() else ""
    if text.strip():
        read_tenants(path)
    changed = _with_key(text, name, hashlib.sha256(key.encode()).hexdigest())
    _checked(load_named(Tenant, changed, str(path)), path)
    made = path.with_name(f".{path.name}.new")
    made.unlink(missing_ok=True)
    made.touch(mode=0o600)
    made.write_text(changed, "utf-8")
    made.rename(path)
    return key


def _with_key(text: str, name: str, digest: str) -> str:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    sections = root.value if isinstance(root, yaml.MappingNode) else []
    body = next((node for key, node in sections if key.value == name), None)
    # In quotes: digits alone would be a number.
    block = f'keys:\n    - "{digest}"\n'
    if body is None:
        return f"{text.rstrip()}\n\n{name}:\n  {block}".lstrip()
    if not isinstance(body, yaml.MappingNode):
        return f"{text[: body.start_mark.index].rstrip()}\n  {block}{text[body.end_mark.index :].lstrip(chr(10))}"
    at = body.start_mark.index
    keys = next((node for key, node in body.value if key.value == "keys"), None)
    if not isinstance(keys, yaml.SequenceNode):
        indent = " " * body.start_mark.column
        return _inserted(text, at, f'keys: ["{digest}"], ' if body.flow_style else f'keys:\n{indent}  - "{digest}"\n{indent}', flow=body.flow_style)
    indent = " " * keys.start_mark.column
    item = f'"{digest}"{", " if keys.value else ""}' if keys.flow_style else f'- "{digest}"\n{indent}'
    return _inserted(text, keys.start_mark.index, item, flow=keys.flow_style)


def _inserted(text: str, at: int, more: str, *, flow: bool) -> str:
    at += flow
    return text[:at] + more + text[at:]


def _checked(named: dict[str, Tenant], path: Path) -> dict[str, Tenant]:
    problems = [] if named else [f"{path}: it names no tenant"]
    problems += [
        f"{path}: {name!r} can't name a tenant: letters, digits, '.', '_' and '-', at most 63" for name in named if not _NAME.fullmatch(name)
    ]
    owners: dict[str, str] = {}
    for name, tenant in named.items():
        problems += [f"{path}: {name}.keys: one of them is {owners[key]}'s, too" for key in tenant.keys if owners.get(key, name) != name]
        owners.update(dict.fromkeys(tenant.keys, name))
    if problems:
        raise SettingsError("\n".join(problems))
    return named


def _numbered(keys: list[str]) -> list[tuple[int, str]]:
    return [(number, key) for number, key in enumerate(keys, 1) if not _HASH.fullmatch(key)]


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
