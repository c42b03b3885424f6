"""The host's limit for bytes between two processes over ZeroMQ: PUSH to PULL over tcp, each frame received into memory that is there.

    python -m deploy.bench.zeromq_stream FRAME_BYTES FRAMES STREAMS plain|curve one|own

``one``: every frame of a stream is the same buffer, at both ends, so the processor's caches hold all of it. ``own``: each frame comes from
and goes to memory of its own, as chunks do. Prints bytes per second. A process of its own, since the limit must owe nothing to Headstart's code.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading
import time

import zmq

_HIGH_WATER = 4
_IO_THREADS = 4
_HOST = "tcp://127.0.0.1"


def send(size: int, frames: int, streams: int, memory: str, keys: list[str]) -> None:
    """The sending process: says on stdout at which ports it is, then sends ``frames`` and one to warm up on each of ``streams``."""
    context = zmq.Context(io_threads=_IO_THREADS)
    places = [buffers(size, frames, memory) for _ in range(streams)]
    sockets = []
    for _ in range(streams):
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
        if keys:
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = keys[0].encode(), keys[1].encode()
        sockets.append((socket, socket.bind_to_random_port(_HOST)))
    print(" ".join(str(port) for _, port in sockets), flush=True)
    _all([threading.Thread(target=_send, args=[socket, own, frames]) for (socket, _), own in zip(sockets, places, strict=True)])
    context.term()


def receive(size: int, frames: int, ports: list[int], memory: str, server_key: bytes) -> float:
    """The receiving process: bytes per second over all streams, counted from when each had its first frame."""
    ready, start = threading.Barrier(len(ports) + 1), threading.Barrier(len(ports) + 1)
    places = [buffers(size, frames, memory) for _ in ports]
    threads = [threading.Thread(target=_receive, args=[own, frames, port, server_key, ready, start]) for port, own in zip(ports, places, strict=True)]
    for thread in threads:
        thread.start()
    ready.wait()
    started = time.perf_counter()
    start.wait()
    for thread in threads:
        thread.join()
    return size * frames * len(ports) / (time.perf_counter() - started)


def buffers(size: int, frames: int, memory: str) -> list[memoryview]:
    """Where a stream's frames are: one buffer of ``size`` bytes, or with ``memory`` "own" one for each. Written once: no copy faults pages in."""
    count = frames if memory == "own" else 1
    whole = memoryview(mmap.mmap(-1, size * count))
    content = b"x" * size
    found = [whole[start : start + size] for start in range(0, size * count, size)]
    for buffer in found:
        buffer[:] = content
    return found


def _send(socket: zmq.Socket[bytes], payloads: list[memoryview], frames: int) -> None:
    for number in range(-1, frames):
        socket.send(payloads[number % len(payloads)], copy=False)
    socket.close()


def _receive(into: list[memoryview], frames: int, port: int, server_key: bytes, ready: threading.Barrier, start: threading.Barrier) -> None:
    context = zmq.Context(io_threads=1)
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
    if server_key:
        socket.curve_serverkey = server_key
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.connect(f"{_HOST}:{port}")
    socket.recv_into(into[-1])
    ready.wait()
    start.wait()
    for number in range(frames):
        buffer = into[number % len(into)]
        if socket.recv_into(buffer) != len(buffer):
            raise ValueError("a frame of another size")
    context.destroy(linger=0)


def _all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main(arguments: list[str]) -> None:
    """Either side, by the arguments."""
    if arguments[0] == "send":
        size, frames, streams = map(int, arguments[1:4])
        send(size, frames, streams, arguments[4], arguments[5:])
        return
    size, frames, streams = map(int, arguments[:3])
    keys = [part.decode() for part in zmq.curve_keypair()] if arguments[3] == "curve" else []
    command = [sys.executable, "-m", "deploy.bench.zeromq_stream", "send", str(size), str(frames), str(streams), arguments[4], *keys]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdout is not None
        ports = [int(port) for port in sender.stdout.readline().split()]
        print(receive(size, frames, ports, arguments[4], keys[0].encode() if keys else b""), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
