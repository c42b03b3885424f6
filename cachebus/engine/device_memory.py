"""Allocations of a GPU that processes share by CUDA IPC, through the driver.

A handle stands for a whole allocation of ``cudaMalloc``; what the driver makes of virtual memory (torch's expandable segments, vLLM's sleep mode) has
none. The driver keeps an allocation for as long as any process has it open, also when its own process is dead: so what is opened is closed
when its engine ends, or the next engine would not find the memory free.
"""

from __future__ import annotations

import ctypes
import functools

from cachebus.errors import HandoverError

_HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    """CUipcMemHandle"""

    _fields_ = (("reserved", ctypes.c_byte * _HANDLE_BYTES),)


def exported(address: int) -> tuple[bytes, int]:
    """A handle for the allocation that ``address`` lies in, and how far in. Raises HandoverError where it has none."""
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    _check("cuMemGetAddressRange_v2", _driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)))
    _check("cuIpcGetMemHandle", _driver().cuIpcGetMemHandle(ctypes.byref(handle), base))
    return bytes(handle), address - base.value


def opened(handle: bytes) -> tuple[int, int]:
    """Where another process's allocation begins here, and its bytes. The device that is current opens it. Raises HandoverError."""
    if len(handle) != _HANDLE_BYTES:
        raise HandoverError(f"a handle of {len(handle)} bytes")
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    # Of the size of the structure, which the driver takes by value.
    given = _Handle.from_buffer_copy(handle)
    _check("cuIpcOpenMemHandle", _driver().cuIpcOpenMemHandle_v2(ctypes.byref(base), given, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS)))
    _check("cuMemGetAddressRange_v2", _driver().cuMemGetAddressRange_v2(None, ctypes.byref(size), base))
    return base.value, size.value


def closed(base: int) -> None:
    """What was opened there is not read any more. Raises HandoverError."""
    _check("cuIpcCloseMemHandle", _driver().cuIpcCloseMemHandle(ctypes.c_uint64(base)))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(call: str, result: int) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(text))
        raise HandoverError(f"{call} says {(text.value or b'').decode() or result}")
