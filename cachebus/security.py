"""Keys of nodes and routers: who may speak to whom over the network.

An operator's folder holds one folder a member (``headstart keys``); a member's folder is what its machine gets, as ``security.keys_dir``::

    own.secret, own.public      the member's CURVE key pair, Z85
    role                        node or router
    digest.key                  32 bytes, the same in the whole cluster: keys the digests of all chunks
    allowed/ROLE/NAME.public    everybody who may connect

Secrets are refused where others than their owner can read them, or, of root's, than this process's group. ``allowed`` is read again when it changes.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cachebus.errors import BusError

MemberRole = Literal["node", "router"]
ROLES: tuple[MemberRole, ...] = get_args(MemberRole)
DIGEST_KEY_BYTES = 32
LOOK_SECONDS = 1.0
"""How long a change of ``allowed`` may go unnoticed."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_Z85_LETTERS = 40


@dataclass(frozen=True)
class Member:
    """A node or a router, and its public key (Z85)."""

    name: str
    role: MemberRole
    public: bytes


class Keyring:
    """What a member's folder holds. Raises BusError where it is incomplete or open to others. Any thread may ask."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.secret = _secret(folder / "own.secret", _Z85_LETTERS)
        self.public = _read(folder / "own.public", _Z85_LETTERS)
        self.digest_key = _secret(folder / "digest.key", DIGEST_KEY_BYTES)
        self._lock = threading.Lock()
        self._members: dict[bytes, Member] = {}
        self._looked_at = float("-inf")

    def member(self, public: bytes) -> Member | None:
        """Whose key it is; None for a stranger's or one that was revoked."""
        return self._known().get(public)

    def public_key(self, node: str) -> bytes:
        """A node's public key. Raises BusError where it is not allowed here."""
        for member in self._known().values():
            if member.name == node and member.role == "node":
                return member.public
        raise BusError(f"cache.peers: {self._folder / 'allowed' / 'node'} has no key of {node!r}; `headstart keys add` makes it")

    def publics(self) -> frozenset[bytes]:
        """Every key that is allowed."""
        return frozenset(self._known())

    def _known(self) -> dict[bytes, Member]:
        with self._lock:
            if time.monotonic() - self._looked_at >= LOOK_SECONDS:
                self._members = {member.public: member for member in _allowed(self._folder)}
                self._looked_at = time.monotonic()
            return self._members


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# What the operator does.


def begin(folder: Path) -> None:
    """Makes an operator's folder with a new digest key. Raises BusError where there is one already."""
    if (folder / "digest.key").exists():
        raise BusError(f"{folder} holds keys already; `headstart keys add` adds to them")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(folder / "digest.key", secrets.token_bytes(DIGEST_KEY_BYTES), private=True)


def add(folder: Path, name: str, role: MemberRole, new_pair: Callable[[], tuple[bytes, bytes]]) -> Path:
    """Makes a member's folder and tells everybody else's of it. Raises BusError."""
    digest_key = _secret(folder / "digest.key", DIGEST_KEY_BYTES)
    if not _NAME.fullmatch(name):
        raise BusError(f"{name!r} can't name a member: letters, digits, '.', '_' and '-', at most 63")
    own = folder / name
    if own.exists():
        raise BusError(f"{own} exists already: revoke {name} first, or choose another name")
    public, secret = new_pair()
    own.mkdir(mode=0o700)
    _write(own / "own.secret", secret, private=True)
    _write(own / "own.public", public)
    _write(own / "role", role.encode())
    _write(own / "digest.key", digest_key, private=True)
    _tell(folder)
    return own


def revoke(folder: Path, name: str) -> None:
    """Removes a member and tells everybody else's folder of it. Raises BusError where there is none of that name."""
    if name not in [member.name for member in members(folder)]:
        raise BusError(f"{folder} has no member {name!r}; `headstart keys list` names them")
    shutil.rmtree(folder / name)
    _tell(folder)


def members(folder: Path) -> list[Member]:
    """Everybody in an operator's folder, by name. Raises BusError where it is none."""
    _secret(folder / "digest.key", DIGEST_KEY_BYTES)
    found = []
    for own in sorted(folder.iterdir()):
        if (own / "own.public").exists():
            role = (own / "role").read_text()
            found.append(Member(own.name, "router" if role == "router" else "node", _read(own / "own.public", _Z85_LETTERS)))
    return found


def _tell(folder: Path) -> None:
    everybody = members(folder)
    for holder in everybody:
        wanted = {folder / holder.name / "allowed" / m.role / f"{m.name}.public": m.public for m in everybody if m.name != holder.name}
        for role in ROLES:
            place = folder / holder.name / "allowed" / role
            place.mkdir(mode=0o755, parents=True, exist_ok=True)
            for path in place.iterdir():
                if path not in wanted:
                    path.unlink()
        for path, public in wanted.items():
            _write(path, public)


def _allowed(folder: Path) -> Iterator[Member]:
    for role in ROLES:
        for path in sorted((folder / "allowed" / role).glob("*.public")):
            try:
                yield Member(path.stem, role, _read(path, _Z85_LETTERS))
            except BusError:
                # It is being copied; the next look finds it whole.
                continue


def _read(path: Path, length: int) -> bytes:
    try:
        found = path.read_bytes()
    except OSError as error:
        raise BusError(f"security.keys_dir: can't read {path}: {error.strerror}; `headstart keys` makes such folders") from error
    if len(found) != length:
        raise BusError(f"security.keys_dir: {path} must hold {length} bytes and holds {len(found)}")
    return found


def _secret(path: Path, length: int) -> bytes:
    found = _read(path, length)
    status = path.stat()
    # Kubernetes hands a secret to a process that is not root as a file of root's that its own group may read.
    handed = status.st_uid == 0 and os.getuid() != 0 and status.st_gid in {os.getgid(), *os.getgroups()}
    if status.st_mode & (0o037 if handed else 0o077):
        raise BusError(f"security.keys_dir: others can read {path}: chmod 600 it")
    return found


def _write(path: Path, content: bytes, *, private: bool = False) -> None:
    made = path.with_name(f".{path.name}.new")
    made.unlink(missing_ok=True)
    made.touch(mode=0o600 if private else 0o644)
    made.write_bytes(content)
    made.rename(path)
