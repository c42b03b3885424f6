"""What people write and by what they are known stays out of every log, at the most talkative level."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sim_cluster import SPEED, SimCluster, post
from tenants_under_test import TenantsUnderTest
from tests_shared import Bus, wait_for

from cachebus.ports import free_port

SECRET = "my mother's maiden name is Quetzalcoatl"
IDS = [12345, 54321, 33333] * 300


class TalkativeCluster:
    """Router and simulated workers as processes at debug level; ``said`` is all that they wrote."""

    def __init__(self, bus: Bus, folder: Path, tenants: TenantsUnderTest) -> None:
        self._bus, self._folder = bus, folder
        self.port = free_port("127.0.0.1")
        profile = SimCluster(bus, folder).profile
        workers = ["--profile", str(profile), "--speed", str(SPEED)]
        self._processes = [
            self._start("sim", "p", "--role", "prefill", "--name", "p", *workers),
            self._start("sim", "d", "--role", "decode", "--workers", "2", "--name", "d", *workers),
            self._start("router", "router", "--set", f"router.port={self.port}", "--set", f"security.tenants_file={tenants.path}"),
        ]

    def _start(self, command: str, name: str, *options: str) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-m", "deploy", command, *options, "--log-level", "debug", "--set", f"cache.run_dir={self._bus.run_dir}"]
        with (self._folder / f"{name}.log").open("wb") as out:
            return subprocess.Popen(arguments, stdout=out, stderr=out)

    def stop(self) -> str:
        """Ends it; what it said."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(30)
        return "".join(path.read_text(errors="replace") for path in self._folder.glob("*.log"))


@pytest.mark.timeout(120)
def test_no_log_has_a_prompt_or_a_key(bus: Bus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tenants = TenantsUnderTest(tmp_path / "tenants.yaml")
    tenants.add("a")
    folder = tmp_path / "logs"
    folder.mkdir()
    with caplog.at_level("DEBUG"):
        cluster = TalkativeCluster(bus, folder, tenants)
        url = f"http://127.0.0.1:{cluster.port}"
        bearer = tenants.bearer("a")
        try:
            wait_for(lambda: "router ready" in (folder / "router.log").read_text(), 60)
            wait_for(lambda: post(url, "/v1/completions", {"prompt": [1, 2]}, bearer)[0] == 200, 60)
            for body in (
                {"prompt": SECRET * 40, "max_tokens": 5, "user": SECRET},
                {"prompt": IDS, "max_tokens": 5},
                {"prompt": SECRET, "max_tokens": -1},
                {"prompt": SECRET, "model": "unknown"},
                {"prompt": SECRET, "n": 2},
                {"prompt": SECRET, "cache_salt": SECRET},
                {"prompt": SECRET, "kv_transfer_params": {"headstart": SECRET}},
            ):
                post(url, "/v1/completions", body, bearer)
            post(url, "/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 5}, bearer)
            assert post(url, "/v1/completions", {"prompt": SECRET}, {"authorization": "Bearer hs-not-one-of-ours"})[0] == 401
            broken = tenants.path.read_text() + f'b:\n  keys: ["{tenants.keys["a"]}"]\n'
            tenants.path.write_text(broken)
            wait_for(
                lambda: post(url, "/v1/completions", {"prompt": [1, 2]}, bearer)[0] == 200 and "stay in force" in (folder / "router.log").read_text()
            )
        finally:
            said = cluster.stop() + caplog.text
    assert "stay in force" in said
    assert len(said) > 1000
    for secret in (SECRET, "Quetzalcoatl", tenants.keys["a"], "not-one-of-ours", "54321, 33333", "54321,33333", *hashes(tenants)):
        assert secret not in said


def hashes(tenants: TenantsUnderTest) -> list[str]:
    return [word.strip('"') for word in tenants.path.read_text().split() if len(word.strip('"')) == 64]
