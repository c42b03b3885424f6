"""Two network namespaces with a cable between them that can be cut. Needs root, ``ip`` and ``nft``."""

from __future__ import annotations

import os
import subprocess

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def run(*command: str, fed: str | None = None) -> None:
    subprocess.run(command, check=True, env={**os.environ, "PATH": PATH}, input=fed, text=True, capture_output=True)


class Cable:
    """Namespaces ``names``, each with an address of ``addresses``."""

    addresses = ("10.231.77.1", "10.231.77.2")

    def __init__(self) -> None:
        self.names = tuple(f"headstart-{os.getpid()}-{number}" for number in range(2))
        ends = [f"hs{os.getpid() % 100_000}n{number}" for number in range(2)]
        for name in self.names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(self.names, ends, self.addresses, strict=True):
            run("ip", "link", "set", end, "netns", name)
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", end)
            run("ip", "-n", name, "link", "set", end, "up")
            run("ip", "-n", name, "link", "set", "lo", "up")

    def inside(self, number: int, *command: str) -> list[str]:
        """A command as it is run in one of them."""
        return ["ip", "netns", "exec", self.names[number], *command]

    def cut(self) -> None:
        """Packets vanish, as they do where a switch dies: nobody is told."""
        chains = "\n".join(f"chain {hook} {{ type filter hook {hook} priority 0; policy drop; }}" for hook in ("input", "output"))
        run(*self.inside(0, "nft", "-f", "-"), fed=f"table inet cut {{\n{chains}\n}}\n")

    def heal(self) -> None:
        run(*self.inside(0, "nft", "delete", "table", "inet", "cut"))

    def close(self) -> None:
        for name in self.names:
            run("ip", "netns", "delete", name)
