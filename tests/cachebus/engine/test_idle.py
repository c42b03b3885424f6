from __future__ import annotations

import threading
import time

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

from cachebus.engine import idle


def cpu_seconds_of_idle_reader(idle_seconds: float) -> float:
    """CPU time that this process takes while a reader waits for a message that comes after ``idle_seconds``."""
    writer = MessageQueue(1, 1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=writer.wait_until_ready)
    ready.start()
    reader.wait_until_ready()
    ready.join()
    writer.enqueue("first")
    assert reader.dequeue(timeout=5) == "first"
    later = threading.Timer(idle_seconds, writer.enqueue, ["second"])
    later.start()
    before = time.process_time()
    assert reader.dequeue(timeout=5) == "second"
    later.join()
    return time.process_time() - before


def test_an_idle_reader_sleeps_and_still_wakes() -> None:
    idle.limit_idle_spin()
    idle.limit_idle_spin()
    assert cpu_seconds_of_idle_reader(0.5) < 0.2
