"""The file of tenants: what is refused, whose key it is, salts, keys made, a file that changes."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pytest

from cachebus import tenants as module
from cachebus.errors import SettingsError
from cachebus.keys import tenant_id
from cachebus.tenants import Tenant, Tenants, TenantsFile, add_key, read_tenants

DIGEST_KEY = b"k" * 32


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tenants.yaml"


def test_every_problem_is_named_by_its_line(path: Path) -> None:
    path.write_text("a:\n  keyz: []\nb:\n  keys: [hs-plain]\n  cache_share_max: 2\n  tokens_per_minute: -1\n")
    with pytest.raises(SettingsError) as refused:
        read_tenants(path)
    lines = str(refused.value).splitlines()
    assert lines[0] == f"{path}:2: a.keyz: no such key; did you mean keys?"
    assert {line.rpartition(": ")[0].partition(": ")[0] for line in lines[1:]} == {f"{path}:4", f"{path}:5", f"{path}:6"}
    assert "hs-plain" not in str(refused.value), "what was meant for a hash may be a key"


@pytest.mark.parametrize("text", ["", "# nobody yet\n", "a b:\n  keys: []\n", "[1]", "a:\n  keys: [{0}]\nb:\n  keys: [{0}]\n", "\x00"])
def test_files_that_say_nothing_certain_are_refused(path: Path, text: str) -> None:
    path.write_text(text.replace("{0}", hashed("x")))
    with pytest.raises(SettingsError, match="tenants"):
        read_tenants(path)


def test_a_missing_file_is_refused(path: Path) -> None:
    with pytest.raises(SettingsError, match="can't read"):
        read_tenants(path)


def test_a_key_is_its_tenants_alone() -> None:
    known = Tenants({"a": Tenant(keys=[hashed("one"), hashed("two")]), "b": Tenant(keys=[hashed("three")])}, DIGEST_KEY)
    assert [known.of_key(key) for key in (b"one", b"two", b"three", b"four", b"", hashed("one").encode())] == ["a", "a", "b", None, None, None]


def test_salts_part_tenants_and_join_groups_the_same_everywhere() -> None:
    named = {"a": Tenant(), "b": Tenant(), "c": Tenant(group="g"), "d": Tenant(group="g"), "g": Tenant()}
    salts = Tenants(named, DIGEST_KEY).salts
    assert salts["c"] == salts["d"]
    assert len(set(salts.values())) == 4
    assert Tenants(named, DIGEST_KEY).salts == salts
    assert not set(Tenants(named, b"j" * 32).salts.values()) & set(salts.values()), "who lacks the key can't make the salt"


def test_a_groups_share_is_its_largest() -> None:
    known = Tenants(
        {"a": Tenant(group="g", cache_share_max=0.2), "b": Tenant(group="g", cache_share_max=0.5), "c": Tenant(cache_share_max=0.1)}, DIGEST_KEY
    )
    assert known.shares() == {tenant_id(known.salts["a"]): 0.5, tenant_id(known.salts["c"]): 0.1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# first\nother:\n  keys: []  # none yet\n",
        "acme:\n  # the limits\n  requests_per_minute: 5\n",
        f"acme:\n  keys:\n    - {'ab' * 32}  # last year's\n  group: g\nother: {{keys: []}}\n",
        f"acme:\n  keys: [{'ab' * 32}]\n",
        "acme:\n  keys: []\n",
        "acme:\nother:\n  group: g\n",
        "acme: {group: g}\n",
    ],
)
def test_a_new_key_goes_into_the_file_as_its_hash_and_nothing_else_changes(path: Path, text: str) -> None:
    if text:
        path.write_text(text)
    before = read_tenants(path) if text else {}
    key = add_key(path, "acme")
    assert len(key) > 40
    assert key not in path.read_text()
    after = read_tenants(path)
    assert Tenants(after, DIGEST_KEY).of_key(key.encode()) == "acme"
    assert set(after["acme"].keys) == {hashed(key), *(before["acme"].keys if "acme" in before else [])}
    assert {name: tenant for name, tenant in after.items() if name != "acme"} == {n: t for n, t in before.items() if n != "acme"}
    assert {line for line in text.splitlines() if "#" in line} <= set(path.read_text().splitlines())
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_broken_file_gets_no_key(path: Path) -> None:
    path.write_text("acme:\n  keyz: []\n")
    with pytest.raises(SettingsError, match="keyz"):
        add_key(path, "acme")
    assert path.read_text() == "acme:\n  keyz: []\n"
    with pytest.raises(SettingsError, match="can't name a tenant"):
        add_key(path.with_name("new.yaml"), "a: b")


def test_a_change_is_taken_and_a_broken_one_leaves_the_old(path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    path.write_text(f"a:\n  keys: [{hashed('one')}]\n")
    file = TenantsFile(path, DIGEST_KEY)
    assert not file.look()
    path.write_text(f"a:\n  keys: [{hashed('one')}]\nb:\n  keys: [{hashed('two')}]\n")
    assert file.look()
    assert file.now.of_key(b"two") == "b"
    # import-linter, run by a test before this one, turns loggers off that it finds.
    monkeypatch.setattr(module.log, "disabled", False)
    with caplog.at_level(logging.DEBUG):
        path.write_text("b:\n  keys: [hs-this-should-be-a-hash]\n")
        assert not file.look()
        path.unlink()
        assert not file.look()
    assert file.now.of_key(b"one") == "a"
    assert caplog.text.count("stay in force") == 2
    assert "hs-this" not in caplog.text
    path.write_text(f"b:\n  keys: [{hashed('two')}]\n")
    assert file.look()
    assert file.now.of_key(b"one") is None


def test_it_looks_once_a_second(path: Path) -> None:
    path.write_text("a:\n  keys: []\n")
    file = TenantsFile(path, DIGEST_KEY)
    path.write_text("a:\n  keys: []\n  group: g\n")
    os.utime(path, ns=(1, 1))
    assert not file.look()
