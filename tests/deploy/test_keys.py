"""``headstart keys`` as an operator uses it."""

import json
from pathlib import Path

import pytest

from cachebus.security import Keyring
from cachebus.tenants import Tenants, read_tenants
from deploy.cli import main


def test_a_cluster_of_two_nodes_and_a_router(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "cluster")
    assert main(["keys", "init", folder]) == 0
    for name, role in (("a", "node"), ("b", "node"), ("front", "router")):
        assert main(["keys", "add", folder, name, "--role", role]) == 0
    told = capsys.readouterr().out
    assert "security.keys_dir" in told
    assert main(["keys", "list", folder, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["members"]
    assert [(row["name"], row["role"]) for row in rows] == [("a", "node"), ("b", "node"), ("front", "router")]
    ring = Keyring(tmp_path / "cluster" / "a")
    assert ring.public_key("b").decode() == rows[1]["public"]
    assert main(["keys", "revoke", folder, "b"]) == 0
    assert not (tmp_path / "cluster" / "a" / "allowed" / "node" / "b.public").exists()


def test_a_second_cluster_in_one_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "init", str(tmp_path)]) == 0
    assert main(["keys", "init", str(tmp_path)]) == 2
    assert main(["keys", "revoke", str(tmp_path), "nobody"]) == 2
    assert "holds keys already" in capsys.readouterr().err


def test_a_tenants_key_is_shown_once_and_kept_as_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tenants.yaml"
    assert main(["keys", "tenant", "acme", "--set", f"security.tenants_file={file}"]) == 0
    key = capsys.readouterr().out.splitlines()[0]
    assert main(["keys", "tenant", "acme", "--file", str(file), "--json"]) == 0
    second = json.loads(capsys.readouterr().out)["key"]
    known = Tenants(read_tenants(file), b"k" * 32)
    assert known.of_key(key.encode()) == known.of_key(second.encode()) == "acme"
    assert key not in file.read_text()
    assert main(["keys", "tenant", "acme"]) == 2
    assert "security.tenants_file is not set" in capsys.readouterr().err
