"""``headstart keys``: who belongs to a cluster, and who may ask it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cachebus import security
from cachebus.errors import SettingsError
from cachebus.tenants import add_key
from cachebus.zeromq_peers import new_pair
from deploy.settings import Settings


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Runs one action. Raises BusError or SettingsError where the folder, the file or the name does not allow it."""
    if options.action == "tenant":
        return _tenant(settings, options)
    folder: Path = options.folder
    if options.action == "init":
        security.begin(folder)
        _say(options, {"folder": str(folder)}, f"{folder} is ready: keep it to yourself. Next: headstart keys add {folder} NAME")
    elif options.action == "add":
        own = security.add(folder, options.name, options.role, new_pair)
        text = f"copy {own} to {options.name} as its security.keys_dir"
        others = [str(folder / member.name / "allowed") for member in security.members(folder) if member.name != options.name]
        lines = [f"{text}, and to the other members these:", *others] if others else [text]
        _say(options, {"member": str(own), "changed": others}, "\n  ".join(lines))
    elif options.action == "revoke":
        security.revoke(folder, options.name)
        others = [str(folder / member.name / "allowed") for member in security.members(folder)]
        _say(options, {"revoked": options.name, "changed": others}, "\n  ".join([f"{options.name} is out once the others have got again:", *others]))
    else:
        found = security.members(folder)
        rows = [{"name": member.name, "role": member.role, "public": member.public.decode()} for member in found]
        lines = [f"{'name':24} {'role':8} public key", *(f"{row['name']:24} {row['role']:8} {row['public']}" for row in rows)]
        _say(options, {"members": rows}, "\n".join(lines))
    return 0


def _tenant(settings: Settings, options: argparse.Namespace) -> int:
    given = options.file or settings.security.tenants_file
    if not given:
        raise SettingsError("security.tenants_file is not set: set it, or give --file")
    key = add_key(Path(given), options.name)
    _say(
        options,
        {"tenant": options.name, "key": key, "file": str(given)},
        f"{key}\n{given} holds its hash alone: keep the key, nobody can show it again",
    )
    return 0


def _say(options: argparse.Namespace, found: dict[str, object], text: str) -> None:
    print(json.dumps(found) if options.json else text)
