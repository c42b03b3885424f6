"""Where the keys lie and who can read them."""

from __future__ import annotations

from pathlib import Path

from cachebus.chunk import key_id
from cachebus.security import DIGEST_KEY_BYTES, ROLES
from cachebus.settings import CacheSettings, SecuritySettings
from deploy.doctor.facts import KeyFacts

_CHANGEABLE = 0o022


def digest_key(cache: CacheSettings, security: SecuritySettings, run_dir: Path) -> KeyFacts:
    """The file that a cachebus with these settings would take its digest key from."""
    if security.digest_key_file:
        return look(Path(security.digest_key_file))
    if security.keys_dir:
        return look(Path(security.keys_dir) / "digest.key")
    return look((Path(cache.local_disk).absolute() if cache.local_disk else run_dir) / "digest.key")


def digest_key_id(facts: KeyFacts) -> bytes:
    """The name of the key in that file; b"" where there is none that can be read."""
    try:
        key = Path(facts.path).read_bytes()
    except OSError:
        return b""
    return key_id(key) if len(key) == DIGEST_KEY_BYTES else b""


def keys_folder(security: SecuritySettings) -> list[KeyFacts]:
    """A member's folder: nobody else may read its secrets, or change who is allowed."""
    if not security.keys_dir:
        return []
    folder = Path(security.keys_dir)
    allowed = [folder / "allowed", *(folder / "allowed" / role for role in ROLES)]
    secrets = [look(folder / name) for name in ("own.secret", "digest.key")]
    return [look(folder, _CHANGEABLE), *secrets, *(look(path, _CHANGEABLE) for path in allowed)]


def look(path: Path, forbidden: int = 0o077) -> KeyFacts:
    """One file or folder."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return KeyFacts(str(path), None, forbidden)
    except OSError as error:
        return KeyFacts(str(path), None, forbidden, error=str(error.strerror))
    return KeyFacts(str(path), found.st_mode & 0o7777, forbidden, found.st_size)
