"""The host's limit for bytes between two processes over ZeroMQ: PUSH to PULL over tcp, each frame received into memory that is there.

    python -m deploy.bench.zeromq_stream FRAME_BYTES FRAMES STREAMS plain|curve

Prints bytes per second. A process of its own, since the limit must owe nothing to Headstart's code.
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


def send(size: int, frames: int, streams: int, keys: list[str]) -> None:
    """The sending process: says on stdout at which ports it is, then sends ``frames`` and one to warm up on each of ``streams``."""
    context = zmq.Context(io_threads=_IO_THREADS)
    payload = memoryview(mmap.mmap(-1, size))
    payload[:] = b"x" * size
    sockets = []
    for _ in range(streams):
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
        if keys:
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = keys[0].encode(), keys[1].encode()
        sockets.append((socket, socket.bind_to_random_port(_HOST)))
    print(" ".join(str(port) for _, port in sockets), flush=True)
    _all([threading.Thread(target=_send, args=[socket, payload, frames + 1]) for socket, _ in sockets])
    context.term()


def receive(size: int, frames: int, ports: list[int], server_key: bytes) -> float:
    """The receiving process: bytes per second over all streams, counted from when each had its first frame."""
    ready, start = threading.Barrier(len(ports) + 1), threading.Barrier(len(ports) + 1)
    threads = [threading.Thread(target=_receive, args=[size, frames, port, server_key, ready, start]) for port in ports]
    for thread in threads:
        thread.start()
    ready.wait()
    started = time.perf_counter()
    start.wait()
    for thread in threads:
        thread.join()
    return size * frames * len(ports) / (time.perf_counter() - started)


def _send(socket: zmq.Socket[bytes], payload: memoryview, frames: int) -> None:
    for _ in range(frames):
        socket.send(payload, copy=False)
    socket.close()


def _receive(size: int, frames: int, port: int, server_key: bytes, ready: threading.Barrier, start: threading.Barrier) -> None:
    context = zmq.Context(io_threads=1)
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
    if server_key:
        socket.curve_serverkey = server_key
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.connect(f"{_HOST}:{port}")
    into = memoryview(mmap.mmap(-1, size))
    socket.recv_into(into)
    ready.wait()
    start.wait()
    for _ in range(frames):
        if socket.recv_into(into) != size:
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
        send(size, frames, streams, arguments[4:])
        return
    size, frames, streams = map(int, arguments[:3])
    keys = [part.decode() for part in zmq.curve_keypair()] if arguments[3] == "curve" else []
    command = [sys.executable, "-m", "deploy.bench.zeromq_stream", "send", str(size), str(frames), str(streams), *keys]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdout is not None
        ports = [int(port) for port in sender.stdout.readline().split()]
        print(receive(size, frames, ports, keys[0].encode() if keys else b""), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
