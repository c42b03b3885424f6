from __future__ import annotations

import os
import subprocess
import sys

from tests_shared import wait_for

from cachebus.engine import process_tree

FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(60)"])
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
