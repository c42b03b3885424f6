"""The processes of a soak: a cache bus, a router and simulated workers, each its own, and what is done to them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec

from cachebus import holder
from cachebus.engine import process_tree
from cachebus.errors import HeadstartError
from cachebus.ports import free_port
from deploy.bench.sim_cluster import await_true, headstart
from deploy.bench.soak_plan import CHUNK_TOKENS, PREFILL_TOKENS_MIN, PROFILE, Fault
from deploy.launcher import answers, registered

HOST = "127.0.0.1"
BUS, ROUTER = "cachebus", "router"
DRAIN_SECONDS_MAX = 20
_END_SECONDS_MAX = DRAIN_SECONDS_MAX + 20
_START_SECONDS_MAX = 90.0
_REGION_GB, _DISK_GB = 0.048, 0.64
"""Room for about a thousand chunks in DRAM and half as many on disk: fewer than the documents have."""
_JOINED_MAX = 2
_TRACEBACK = b"Traceback (most recent call last)"


@dataclass(frozen=True)
class SoakPlan:
    """What to start. ``settings``: SECTION.KEY=VALUE for every process, after the soak's own."""

    prefill: int
    decode: int
    speed: float
    router_processes: int
    settings: Sequence[str] = ()
    folder: Path | None = None


@dataclass
class Done:
    """What was done to the processes, and what of it did not go as it must."""

    faults: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    router_away: list[tuple[float, float]] = field(default_factory=list)
    """From when to when (monotonic seconds) a killed router was not there."""


class SoakCluster:
    """Made and started by ``start``; ``end`` must follow. All its calls belong to one event loop's thread, which must be the main one."""

    def __init__(self, plan: SoakPlan, logs: Path) -> None:
        self._plan, self._logs = plan, logs
        self._place = tempfile.TemporaryDirectory(prefix="headstart-soak-", dir=plan.folder)
        self.run_dir = Path(self._place.name)
        first = free_port(HOST, 1 + plan.router_processes)
        self.url = f"http://{HOST}:{first}"
        self.admin = [f"http://{HOST}:{first + 1 + number}" for number in range(plan.router_processes)]
        self.region = Path(f"/dev/shm/{self.run_dir.name}")
        self._profile = self.run_dir / "profile.json"
        self._profile.write_bytes(msgspec.json.encode(PROFILE))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._draining: set[str] = set()
        self._logged_before = {path: path.stat().st_size for path in logs.glob("*.log")}
        self._numbers = itertools.count()
        self.done = Done()
        cache = [f"run_dir={self.run_dir}", f"region_path={self.region}", f"chunk_size={CHUNK_TOKENS}", "pull_tokens_min=16"]
        cache += [f"max_local_cpu_size={_REGION_GB}", f"local_disk={self.run_dir / 'disk'}", f"max_local_disk_size={_DISK_GB}"]
        router = [f"port={first}", f"admin_port={first + 1}", f"processes={plan.router_processes}", f"prefill_tokens_min={PREFILL_TOKENS_MIN}"]
        self._settings = [f"cache.{one}" for one in cache] + [f"router.{one}" for one in router]
        self._settings += [f"{role}.drain_seconds_max={DRAIN_SECONDS_MAX}" for role in ("prefill", "decode", "router")]
        self._settings += plan.settings

    def start(self) -> None:
        """Raises HeadstartError where it does not get ready."""
        self._launch(BUS)
        await_true("the cachebus", lambda: registered(self.run_dir) is not None)
        for role, count in (("prefill", self._plan.prefill), ("decode", self._plan.decode)):
            for _ in range(count):
                self.add(role)
        await_true("the simulated workers", self.workers_ready)
        self._launch(ROUTER)
        await_true("the router", self.router_ready)

    def workers_ready(self) -> bool:
        """Whether exactly those that run are registered, and none is ending."""
        return {worker.worker for worker in registered(self.run_dir) or ()} == set(self._workers()) and not self._draining

    def router_ready(self) -> bool:
        """Whether each of its processes is."""
        return all(answers(f"{url}/health") for url in self.admin) and answers(f"{self.url}/ready")

    def add(self, role: str) -> None:
        """One more worker."""
        self._launch(f"{role}-{next(self._numbers)}")

    async def suffer(self, fault: Fault) -> None:
        """Returns once the fault is over and what died was replaced. What must not happen is written down in ``done``."""
        target = self._victim(fault)
        if target is None:
            return
        self.done.faults[f"{fault.kind} {fault.role}" if fault.kind in ("kill", "drain", "stop", "join") else fault.kind] += 1
        if fault.kind == "join":
            self.add(fault.role)
        elif fault.kind.startswith("stop"):
            await self._stop(target, fault.seconds)
        elif fault.kind == "drain":
            await self._drain(target, fault)
        else:
            await self._kill(target, fault)

    def look(self) -> None:
        """Writes down which processes have ended by themselves, and starts them again."""
        for name, process in list(self.processes.items()):
            if process.poll() is not None and name not in self._draining:
                self.done.failures.append(f"{name} ended by itself with {process.returncode}")
                del self.processes[name]
                if name in (BUS, ROUTER):
                    self._launch(name)
                else:
                    self.add(name.partition("-")[0])

    async def end(self) -> list[str]:
        """Ends all and says what did not end well or is left: processes, exit codes, files."""
        found: list[str] = []
        for names in ([ROUTER], self._workers(), [BUS]):
            group = {name: self.processes[name] for name in names if name in self.processes}
            for process in group.values():
                _signal(process, signal.SIGTERM)
            for name, process in group.items():
                code = await self._exit(process)
                if code != 0:
                    found.append(f"{name} ended with {code}" if code is not None else f"{name} did not end within {_END_SECONDS_MAX} s")
        found += [f"process {pid} is left" for pid in process_tree.descendants(os.getpid()) if self._is_ours(pid)]
        found += [f"{path} is left" for path in self._regions()]
        found += self._tracebacks()
        found += [f"holder {name} is still locked" for name in holder.living(self.run_dir)]
        return found

    def kill_all(self) -> None:
        """Kills what is left and removes the files."""
        for process in self.processes.values():
            process_tree.kill_tree(process)
        self._place.cleanup()
        for path in self._regions():
            path.unlink(missing_ok=True)

    def _tracebacks(self) -> list[str]:
        """None is due: what a client or a dead neighbour can cause is an error in words."""
        found = []
        for path in sorted(self._logs.glob("*.log")):
            with path.open("rb") as file:
                file.seek(self._logged_before.get(path, 0))
                if count := sum(line.startswith(_TRACEBACK) for line in file):
                    found.append(f"{path.name} has {count} tracebacks")
        return found

    def _regions(self) -> list[Path]:
        return list(self.region.parent.glob(f"{self.region.name}*"))

    def router_pids(self) -> list[int]:
        """The processes that serve: the children, where there are several."""
        if ROUTER not in self.processes:
            return []
        pid = self.processes[ROUTER].pid
        return [pid] if self._plan.router_processes == 1 else process_tree.descendants(pid)

    def _workers(self, role: str = "") -> list[str]:
        return [name for name, one in self.processes.items() if name not in (BUS, ROUTER) and name.startswith(role) and one.poll() is None]

    def _victim(self, fault: Fault) -> str | None:
        if fault.kind.endswith((" bus", " router")):
            name = BUS if fault.kind.endswith(" bus") else ROUTER
            return name if name in self.processes else None
        names = [name for name in self._workers(fault.role) if name not in self._draining]
        wanted = self._plan.prefill if fault.role == "prefill" else self._plan.decode
        if not names or (fault.kind == "join" and len(names) >= wanted + _JOINED_MAX):
            return None
        return names[int(fault.which * len(names))]

    async def _stop(self, name: str, seconds: float) -> None:
        process = self.processes[name]
        pids = [process.pid, *process_tree.descendants(process.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        if process.poll() is None:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    async def _drain(self, name: str, fault: Fault) -> None:
        """The pool goes back to its size: where one had joined, none comes instead."""
        process = self.processes[name]
        self._draining.add(name)
        known = name in {worker.worker for worker in await asyncio.to_thread(registered, self.run_dir) or ()}
        _signal(process, signal.SIGTERM)
        await self._replace(fault)
        code = await self._exit(process)
        self._draining.discard(name)
        del self.processes[name]
        # One that had just begun has no handler yet.
        if code != 0 and (known or code != -signal.SIGTERM):
            self.done.failures.append(f"{name} was to drain and ended with {code}")

    async def _kill(self, name: str, fault: Fault) -> None:
        process = self.processes.pop(name)
        began = time.monotonic()
        process_tree.kill_tree(process)
        if name not in (BUS, ROUTER):
            await self._replace(fault)
            return
        await asyncio.sleep(fault.seconds)
        self._launch(name)
        if name == ROUTER:
            try:
                await asyncio.to_thread(await_true, name, self.router_ready, _START_SECONDS_MAX)
            except HeadstartError as error:
                self.done.failures.append(str(error))
            self.done.router_away.append((began, time.monotonic()))

    async def _replace(self, fault: Fault) -> None:
        await asyncio.sleep(fault.seconds)
        wanted = self._plan.prefill if fault.role == "prefill" else self._plan.decode
        if len([name for name in self._workers(fault.role) if name not in self._draining]) < wanted:
            self.add(fault.role)

    async def _exit(self, process: subprocess.Popen[bytes]) -> int | None:
        deadline = time.monotonic() + _END_SECONDS_MAX
        while process.poll() is None:
            if time.monotonic() > deadline:
                return None
            await asyncio.sleep(0.1)
        return process.returncode

    def _launch(self, name: str) -> None:
        role = name.partition("-")[0]
        if role in (BUS, ROUTER):
            command = headstart(role)
        else:
            command = [*headstart("sim"), "--role", role, "--name", name, "--speed", str(self._plan.speed), "--profile", str(self._profile)]
        command += ["--log-level", "warning", *(part for setting in self._settings for part in ("--set", setting))]
        with contextlib.ExitStack() as stack:
            out: IO[bytes] = stack.enter_context((self._logs / f"{role}.log").open("ab"))
            self.processes[name] = process_tree.start(command, os.environ, stdout=out, stderr=out)

    def _is_ours(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return str(self.run_dir).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        return False


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    if process.poll() is None:
        process.send_signal(number)
