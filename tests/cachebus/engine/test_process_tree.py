from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests_shared import wait_for

from cachebus.engine import process_tree

FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(60)"])
time.sleep(60)
"""

SHARES_MEMORY = """
import time
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=4096)
print(memory.name, flush=True)
time.sleep(60)
"""


def family() -> tuple[subprocess.Popen[bytes], int]:
    parent = process_tree.start([sys.executable, "-c", FAMILY], os.environ, stdout=subprocess.PIPE, stderr=None)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def test_a_tree_is_killed_with_children_that_left_the_session() -> None:
    parent, child = family()
    assert process_tree.descendants(parent.pid) == [child]
    process_tree.kill_tree(parent)
    assert parent.returncode == -9
    wait_for(lambda: not process_tree.is_running(child))


def test_children_of_a_dead_parent_are_killed_when_they_were_known() -> None:
    parent, child = family()
    known = process_tree.descendants(parent.pid)
    parent.kill()
    parent.wait()
    assert process_tree.is_running(child)
    process_tree.kill_tree(parent, known)
    wait_for(lambda: not process_tree.is_running(child))


def test_a_process_ends_with_the_one_that_started_it() -> None:
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from cachebus.engine import process_tree
child = process_tree.start([sys.executable, "-c", "import time; time.sleep(60)"], os.environ, stdout=None, stderr=None)
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    wait_for(lambda: not process_tree.is_running(int(shown.stdout)))


def test_shared_memory_of_a_killed_tree_is_removed() -> None:
    process = process_tree.start([sys.executable, "-c", SHARES_MEMORY], os.environ, subprocess.PIPE, None)
    assert process.stdout is not None
    path = Path("/dev/shm", process.stdout.readline().decode().strip())
    assert process_tree.shared_memory([process.pid]) == {path}
    process_tree.kill_tree(process)
    assert not path.exists()


def test_shared_memory_that_was_seen_before_its_process_died_is_removed(tmp_path: Path) -> None:
    process = process_tree.start([sys.executable, "-c", ""], os.environ, None, None)
    process.wait()
    path = tmp_path / "psm_x"
    path.touch()
    process_tree.kill_tree(process, shared=[path, tmp_path / "gone"])
    assert not path.exists()
