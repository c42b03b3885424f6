"""Pods of the manifests as processes of this machine: their arguments, variables and settings as rendered, an address of loopback for each pod.

What stands in for a cluster: a file of names in place of its DNS, folders in place of volumes, free ports in place of the fixed ones, and a simulated
worker in place of vLLM.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import msgspec
from peer_nodes import free_ports
from rendering import ROOT, Object, environment, mounted_keys, settings_text
from sim_cluster import PROFILE, SPEED
from tests_shared import wait_for

_DNS = """
import socket
_real = socket.getaddrinfo
def getaddrinfo(host, port, *more, **named):
    if host != "headstart-nodes":
        return _real(host, port, *more, **named)
    addresses = open({names!r}).read().split()
    if not addresses:
        raise socket.gaierror("no pod is there")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]
socket.getaddrinfo = getaddrinfo
"""


class Pods:
    """``folder`` has to be short: sockets lie below it. ``keys`` are the secret's data."""

    def __init__(self, objects: list[Object], folder: Path, keys: Mapping[str, bytes]) -> None:
        self._folder, self._keys = folder, keys
        self._names = folder / "names"
        self._names.write_text("")
        (folder / "dns").mkdir()
        (folder / "dns" / "sitecustomize.py").write_text(_DNS.format(names=str(self._names)))
        (folder / "profile.json").write_bytes(msgspec.json.encode(PROFILE))
        self.port, node = free_ports(6), free_ports(3)
        # 8000: routers and workers, 9400 and 9401: metrics, 7000: other nodes.
        moved = {8000: self.port, 9400: self.port + 1, 9401: self.port + 2, 7000: node}
        text = re.sub(r"\b(8000|9400|9401|7000)\b", lambda found: str(moved[int(found[1])]), settings_text(objects))
        (folder / "headstart.yaml").write_text(text)
        self.processes: dict[tuple[str, str], subprocess.Popen[bytes]] = {}

    def start(self, pod: Object, name: str, address: str) -> None:
        """A pod's containers in their order, each once the one before is ready, as the kubelet does."""
        shared = {volume["name"] for volume in pod["volumes"] if "hostPath" in volume}
        if any(volume["name"] == "keys" for volume in pod["volumes"]):
            mounted_keys(pod, "headstart-keys", self._keys, self._folder / name / "keys")
        # What gives the host's folders away has nothing to do here: they are this user's.
        for container in [c for c in [*pod.get("initContainers", []), *pod["containers"]] if "command" not in c]:
            self._start(container, name, address, shared)
            if container["name"] == "cachebus":
                wait_for(lambda: self.answers(f"http://{address}:{self.port + 1}/ready"), 20)

    def resolve(self, *addresses: str) -> None:
        """What the name of all nodes resolves to from now on."""
        self._names.write_text(" ".join(addresses))

    def end(self, name: str, container: str) -> int:
        """SIGTERM; returns the exit code."""
        process = self.processes.pop((name, container))
        process.terminate()
        return process.wait(30)

    def stop(self) -> None:
        """Ends all, sidecars last."""
        for sidecars in (False, True):
            group = [process for (_, container), process in self.processes.items() if (container == "cachebus") == sidecars]
            for process in group:
                process.terminate()
            for process in group:
                process.wait(30)

    def said(self, name: str, container: str) -> str:
        return (self._folder / f"{name}-{container}.log").read_text()

    @staticmethod
    def answers(url: str) -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _start(self, container: Object, name: str, address: str, shared: set[str]) -> None:
        variables = environment(container, {"status.podIP": address, "metadata.name": name})
        given = dict(variables)
        for mount in container["volumeMounts"]:
            folder = self._folder / ("host" if mount["name"] in shared else name) / mount["name"]
            folder.mkdir(parents=True, exist_ok=True)
            inside = {key: value for key, value in given.items() if value.startswith(mount["mountPath"])}
            variables |= {key: value.replace(mount["mountPath"], str(folder), 1) for key, value in inside.items()}
        variables |= {"HEADSTART_SECURITY_KEYS_DIR": str(self._folder / name / "keys"), "HEADSTART_CACHE_MAX_LOCAL_CPU_SIZE": "0.05"}
        if container["name"] == "router":
            # All of 127.0.0.0/8 is this machine's, so only its own address tells the pods apart. By rule, so that what is to happen is known.
            variables |= {"HEADSTART_ROUTER_HOST": address, "HEADSTART_ROUTER_POLICY": "prefix_affinity"}
        arguments = [variables.get(a[2:-1], a) if a.startswith("$(") else a for a in container["args"]]
        arguments[arguments.index("--config") + 1] = str(self._folder / "headstart.yaml")
        if arguments[0] in ("prefill", "decode"):
            simulated = ["--port", str(self.port), "--profile", str(self._folder / "profile.json"), "--speed", str(SPEED)]
            arguments = ["sim", "--role", *arguments, *simulated]
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HEADSTART_")}
        python_path = f"{self._folder / 'dns'}:{ROOT}"
        with (self._folder / f"{name}-{container['name']}.log").open("ab") as out:
            self.processes[name, container["name"]] = subprocess.Popen(
                [sys.executable, "-m", "deploy", *arguments], env={**kept, **variables, "PYTHONPATH": python_path}, stdout=out, stderr=out
            )
