"""Podman for the tests: a storage, networks and a base image of their own, and `docker` in its place, so that a page's commands run as they are."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cachebus.ports import free_port

ROOT = Path(__file__).parents[3]
STORE = Path("/var/tmp/headstart-test-containers")
BASE = "localhost/headstart-test-base:bookworm-2"
REDIS = "localhost/headstart-test-redis:bookworm-2"
SECONDS_MAX = 240
_MIRROR = "$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' | head -n 1)"
"""Where this machine's apt gets it from; nothing, and so debootstrap's own choice, where it is of another release."""
_COPIED = ("cachebus", "compose", "decode", "deploy", "prefill", "router", "pyproject.toml", "README.md", "LICENSE", ".dockerignore")
_DOCKER = """#!/bin/sh
# What the page calls `docker` is Podman here, and its builds start from the tests' base, with this machine's way to the package index.
case "$1" in
  compose) shift; exec "{compose}" "$@" ;;
  build) shift; exec podman build {build} "$@" ;;
  *) exec podman "$@" ;;
esac
"""


@dataclass
class Engine:
    """Commands in ``folder``, a copy of what the images and the compose files are made of."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, command: str | Sequence[str], *, check: bool = True, seconds_max: float = SECONDS_MAX) -> str:
        """Runs a shell script (or an argument vector) in compose/ and returns its output. Raises AssertionError where it fails and ``check``."""
        arguments = ["bash", "-euo", "pipefail", "-c", command] if isinstance(command, str) else list(command)
        done = subprocess.run(
            arguments, cwd=self.folder / "compose", env=self.environment, text=True, capture_output=True, timeout=seconds_max, check=False
        )
        assert not check or done.returncode == 0, f"{command}\nexit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    @property
    def url(self) -> str:
        """The router's address."""
        return f"http://127.0.0.1:{self.environment['HEADSTART_PORT']}"

    def await_ready(self, seconds_max: float = 120) -> None:
        """Until the router would answer. Raises AssertionError."""
        deadline = time.monotonic() + seconds_max
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/ready", timeout=2):
                    return
            except OSError:
                assert time.monotonic() < deadline, f"not ready:\n{self.logs()}"
                time.sleep(0.3)

    def workers(self) -> str:
        """What ``headstart status`` says in the cachebus's container."""
        return self.run("docker compose exec -T cachebus headstart status", check=False)

    def logs(self) -> str:
        """The last lines of every container."""
        return self.run("for c in $(podman ps -aq); do podman ps -a --filter id=$c; podman logs --tail 15 $c 2>&1; done", check=False)

    def clean(self) -> None:
        """Removes every container, volume and network of this storage; images stay for the next time."""
        # Podman removes none on which another one depends, so the second turn takes those.
        self.run(
            "for turn in 1 2; do podman rm --all --force --time 0 || true; done; podman volume prune --force; podman network prune --force",
            check=False,
        )


@contextmanager
def engine(folder: Path, mounts: Sequence[str] = ()) -> Iterator[Engine]:
    """An engine with nothing running, and nothing left behind but images. ``mounts``: in every container, as Podman's --volume takes them."""
    STORE.mkdir(mode=0o700, exist_ok=True)
    with (STORE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = Engine(_copied(folder / "headstart"), _environment(folder, mounts))
        made.clean()
        try:
            _make_base(made, folder)
            yield made
        finally:
            made.clean()


def _copied(target: Path) -> Path:
    target.mkdir()
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "secrets", ".env"))
        else:
            shutil.copy(source, target / name)
    return target


def _environment(folder: Path, mounts: Sequence[str]) -> dict[str, str]:
    volumes = ", ".join(f'"{mount}"' for mount in mounts)
    (folder / "containers.conf").write_text(
        # Limits below the kernel's own, which a container inside a virtual machine may not be allowed to raise.
        f'[containers]\ndefault_ulimits = ["nofile=1024:4096", "nproc=1024:4096"]\nvolumes = [{volumes}]\n'
        f'[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n[network]\nnetwork_config_dir = "{STORE}/networks"\n'
    )
    (folder / "storage.conf").write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{STORE}/images"\nrunroot = "{STORE}/run"\n')
    pip = [f"[global]\ncert = /etc/ssl/host/{Path(os.environ.get('PIP_CERT', '/etc/ssl/certs/ca-certificates.crt')).name}\ntimeout = 60"]
    pip += [f"index-url = {os.environ['PIP_INDEX_URL']}"] if "PIP_INDEX_URL" in os.environ else []
    (folder / "pip.conf").write_text("\n".join(pip) + "\n")
    bases = f"--build-arg BASE={BASE} --build-arg WORKER_BASE={BASE}"
    build = f"--quiet {bases} --secret id=pip,src={folder}/pip.conf --volume /etc/ssl/certs:/etc/ssl/host:ro"
    programs = folder / "bin"
    programs.mkdir()
    (programs / "docker").write_text(_DOCKER.format(compose=Path(sys.executable).with_name("podman-compose"), build=build))
    (programs / "podman-compose").symlink_to(Path(sys.executable).with_name("podman-compose"))
    (programs / "docker").chmod(0o755)
    return {
        "PATH": f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(folder),
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "HEADSTART_PORT": str(free_port("127.0.0.1")),
        "HEADSTART_REDIS_IMAGE": REDIS,
        "HEADSTART_DRAM_GB": "0.5",
        "HEADSTART_DISK_GB": "1",
        "HEADSTART_REDIS_MEMORY": "256mb",
    }


def _make_base(made: Engine, folder: Path) -> None:
    """Debian 12 with Python, by debootstrap; and Redis on top of it. Kept in the storage."""
    if made.run(f"podman image exists {BASE} && podman image exists {REDIS} && echo there", check=False):
        return
    root = folder / "root"
    made.run(f"debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates,libnuma1,redis-server bookworm {root} {_MIRROR}")
    made.run(f"tar -C {root} -c --exclude='./var/cache/apt/*' --exclude='./var/lib/apt/lists/*' . | podman import --quiet - {BASE}")
    shutil.rmtree(root)
    build(made, folder / "redis", REDIS, f"FROM {BASE}\nRUN install -d -o 999 -g 999 /data\n")


def build(made: Engine, folder: Path, name: str, dockerfile: str, **files: str) -> None:
    """A small image of the tests' own: a Dockerfile and the files beside it."""
    folder.mkdir()
    for file, text in files.items():
        (folder / file).write_text(text)
    (folder / "Dockerfile").write_text(dockerfile)
    made.run(f"podman build --quiet --tag {name} {folder}")
