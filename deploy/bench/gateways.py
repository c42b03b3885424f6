"""The gateways that a routing benchmark compares, as processes before one cluster of simulated workers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachebus.errors import SettingsError
from cachebus.ports import free_port
from deploy.bench.sim_cluster import SimCluster, await_true, headstart, process
from deploy.launcher import answers

OURS, VLLM_ROUTER, SMG = "headstart", "vllm-router", "smg"
_HOST = "127.0.0.1"
_READY_SECONDS_MAX = 60.0
_REQUESTS_MAX = 100_000


@dataclass(frozen=True)
class Gateway:
    """A system with one of its policies; "" is the one that it has by itself. ``command``: its executable, where it is not ours."""

    system: str
    policy: str
    command: Path | None = None
    processes: int = 1
    """Of ours."""

    @property
    def label(self) -> str:
        """For people and rows."""
        return f"{self.system} {self.policy}".strip()


def chosen(systems: str, executables: Mapping[str, Path | None]) -> list[Gateway]:
    """The gateways of ``--systems``: names with commas, each with ``:POLICY`` where it is not to use its own. Raises SettingsError.

    ``executables``: where those are that are not ours.
    """
    found = []
    for part in systems.split(","):
        system, _, policy = part.strip().partition(":")
        if system != OURS and system not in executables:
            raise SettingsError(f"--systems {systems}: {system!r} is none of {', '.join([OURS, *executables])}")
        command = executables.get(system)
        if system != OURS and command is None:
            raise SettingsError(f"--systems {systems}: name the executable of {system} with --{system}")
        found.append(Gateway(system, policy, command))
    return found


@dataclass(frozen=True)
class Running:
    """A gateway that serves: its URL, and its process."""

    url: str
    pid: int


@contextlib.contextmanager
def running(gateway: Gateway, cluster: SimCluster, logs: Path | None, cores: Iterable[int] = ()) -> Iterator[Running]:
    """While it serves the cluster, on these cores alone where some are given. Raises HeadstartError where it does not get ready."""
    port = free_port(_HOST)
    url = f"http://{_HOST}:{port}"
    make = {OURS: _ours, VLLM_ROUTER: _vllm_router, SMG: _smg}[gateway.system]
    command = make(gateway, cluster, port)
    chosen_cores = ",".join(map(str, cores))
    pinned = ["taskset", "-c", chosen_cores] if chosen_cores else []
    with process([*pinned, *command], logs, gateway.label.replace(" ", "-")) as started:
        await_true(gateway.label, lambda: answers(f"{url}/{'ready' if gateway.system == OURS else 'health'}"), _READY_SECONDS_MAX)
        yield Running(url, started.pid)


def _ours(gateway: Gateway, cluster: SimCluster, port: int) -> list[str]:
    settings = [f"cache.run_dir={cluster.run_dir}", f"router.port={port}", f"router.requests_max={_REQUESTS_MAX}"]
    settings += [f"router.policy={gateway.policy}"] if gateway.policy else []
    if gateway.processes > 1:
        settings += [f"router.processes={gateway.processes}", f"router.admin_port={free_port(_HOST, gateway.processes)}"]
    return [*headstart("router"), "--log-level", "warning", *(part for setting in settings for part in ("--set", setting))]


def _vllm_router(gateway: Gateway, cluster: SimCluster, port: int) -> list[str]:
    workers: Sequence[str] = [
        *(part for url in cluster.urls("prefill") for part in ("--prefill", url)),
        *(part for url in cluster.urls("decode") for part in ("--decode", url)),
    ]
    policy = ["--policy", gateway.policy] if gateway.policy else []
    check = ["--worker-startup-check-interval", "1", "--log-level", "warning"]
    return [str(gateway.command), "--host", _HOST, "--port", str(port), "--vllm-pd-disaggregation", *workers, *policy, *check]


def _smg(gateway: Gateway, cluster: SimCluster, port: int) -> list[str]:
    """Its two-leg mode over HTTP is made for another engine; so every worker does everything, as its users have it with vLLM."""
    policy = ["--policy", gateway.policy] if gateway.policy else []
    command = [
        str(gateway.command),
        "launch",
        "--host",
        _HOST,
        "--port",
        str(port),
        "--worker-urls",
        *cluster.urls("prefill"),
        *cluster.urls("decode"),
    ]
    return [*command, *policy, "--prometheus-port", str(free_port(_HOST)), "--worker-startup-check-interval", "1", "--log-level", "warn"]
