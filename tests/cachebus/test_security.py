"""Key folders: what the operator's commands make of them, and what is refused."""

import os
from pathlib import Path

import pytest

from cachebus import security
from cachebus.errors import BusError
from cachebus.security import Keyring, Member
from cachebus.zeromq_peers import new_pair


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    security.begin(tmp_path / "keys")
    for name, role in (("one", "node"), ("two", "node"), ("front", "router")):
        security.add(tmp_path / "keys", name, role, new_pair)  # type: ignore[arg-type]
    return tmp_path / "keys"


def test_everybody_knows_everybody_else(folder: Path) -> None:
    rings = {name: Keyring(folder / name) for name in ("one", "two", "front")}
    assert rings["one"].member(rings["two"].public) == Member("two", "node", rings["two"].public)
    assert rings["one"].member(rings["front"].public) == Member("front", "router", rings["front"].public)
    assert rings["one"].member(rings["one"].public) is None
    assert rings["one"].public_key("two") == rings["two"].public
    assert len({ring.digest_key for ring in rings.values()}) == 1
    assert [(m.name, m.role) for m in security.members(folder)] == [("front", "router"), ("one", "node"), ("two", "node")]


def test_a_revoked_member_is_forgotten_within_a_second(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Keyring(folder / "one")
    public = Keyring(folder / "two").public
    assert ring.member(public)
    security.revoke(folder, "two")
    now = security.time.monotonic()
    monkeypatch.setattr(security.time, "monotonic", lambda: now + security.LOOK_SECONDS)
    assert ring.member(public) is None
    with pytest.raises(BusError, match="no member 'two'"):
        security.revoke(folder, "two")


@pytest.mark.parametrize("name", ["own.secret", "digest.key"])
def test_a_secret_that_others_can_read_is_refused(folder: Path, name: str) -> None:
    (folder / "one" / name).chmod(0o640)
    with pytest.raises(BusError, match="chmod 600"):
        Keyring(folder / "one")


@pytest.mark.parametrize(("group", "mode", "taken"), [(4711, 0o440, True), (4711, 0o460, False), (4711, 0o444, False), (4712, 0o440, False)])
def test_a_secret_of_roots_may_be_read_by_the_group_it_was_handed_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch, group: int, mode: int, taken: bool
) -> None:
    for name in ("own.secret", "digest.key"):
        os.chown(folder / "one" / name, 0, group)
        (folder / "one" / name).chmod(mode)
    monkeypatch.setattr(security.os, "getuid", lambda: 10001)
    monkeypatch.setattr(security.os, "getgroups", lambda: [4711])
    if taken:
        Keyring(folder / "one")
        return
    with pytest.raises(BusError, match="chmod 600"):
        Keyring(folder / "one")


@pytest.mark.parametrize("name", ["own.secret", "own.public", "digest.key"])
@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_folder_that_is_not_whole_is_refused(folder: Path, name: str, damage: str) -> None:
    path = folder / "one" / name
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, 10)
    with pytest.raises(BusError, match=name):
        Keyring(folder / "one")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 64])
def test_a_name_is_a_name(folder: Path, name: str) -> None:
    with pytest.raises(BusError, match="can't name a member"):
        security.add(folder, name, "node", new_pair)


def test_nothing_is_made_twice(folder: Path) -> None:
    with pytest.raises(BusError, match="exists already"):
        security.add(folder, "one", "node", new_pair)
    with pytest.raises(BusError, match="holds keys already"):
        security.begin(folder)


def test_a_key_that_is_half_copied_is_nobodys(folder: Path) -> None:
    (folder / "one" / "allowed" / "node" / "two.public").write_bytes(b"half")
    ring = Keyring(folder / "one")
    with pytest.raises(BusError, match="no key of 'two'"):
        ring.public_key("two")
    assert ring.public_key


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_what_is_loopback(host: str) -> None:
    assert security.is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "node-1", "::"])
def test_what_is_not(host: str) -> None:
    assert not security.is_loopback(host)
