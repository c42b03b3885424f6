"""The blocks of other engines on this GPU, or on one whose memory this GPU reads: opened when they are first fetched from."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cachebus.engine import device_memory
from cachebus.errors import HandoverError
from cachebus.messages_handover import SharedMemory

_ID_BYTES = 16


@dataclass(frozen=True)
class _Opened:
    layers: torch.Tensor
    """int64 [layer], on the device: where block 0 of each lies here"""
    bases: list[int]


def described(
    device: torch.device, addresses: Sequence[int], count: int, stride_and_page_bytes: tuple[int, int], holder_and_layout: tuple[str, bytes]
) -> SharedMemory:
    """How other processes reach ``count`` blocks at ``addresses`` (one a layer). Raises HandoverError where an allocation can't be shared."""
    layers = [device_memory.exported(address) for address in addresses]
    return SharedMemory(secrets.token_bytes(_ID_BYTES), *holder_and_layout, _uuid(device.index), layers, count, *stride_and_page_bytes)


class DeviceNeighbours:
    """Other engines' blocks as ``device`` sees them, alike to its own: so many layers, a page of so many bytes every so many. Any thread may ask."""

    def __init__(self, device: torch.device, layers: int, stride_bytes: int, page_bytes: int) -> None:
        self._device, self._alike = device, (layers, stride_bytes, page_bytes)
        self._opened: dict[bytes, _Opened] = {}
        self._lock = threading.Lock()

    def reaches(self) -> list[str]:
        """The UUIDs of this GPU and of those whose memory it reads; one that the process does not see is not among them."""
        own = self._device.index
        others = [index for index in range(torch.cuda.device_count()) if index != own and torch.cuda.can_device_access_peer(own, index)]
        return [_uuid(index) for index in (own, *others)]

    def layers(self, memory: SharedMemory, blocks: Sequence[int]) -> torch.Tensor:
        """Where the layers lie. Raises HandoverError where they can't be opened, or where one of ``blocks`` is not theirs."""
        memory.check(blocks)
        with self._lock:
            if memory.id not in self._opened:
                self._opened[memory.id] = self._open(memory)
            return self._opened[memory.id].layers

    def unmap(self, memory: SharedMemory) -> None:
        """Closes what was opened of an engine that has ended. Raises HandoverError."""
        with self._lock:
            opened = self._opened.pop(memory.id, None)
        for base in opened.bases if opened is not None else ():
            device_memory.closed(base)

    def _open(self, memory: SharedMemory) -> _Opened:
        alike = (len(memory.layers), memory.stride_bytes, memory.page_bytes)
        if alike != self._alike:
            raise HandoverError(f"blocks that lie otherwise than those here: layers, stride and bytes are {alike}, here {self._alike}")
        places: dict[bytes, tuple[int, int]] = {}
        try:
            for handle, _ in memory.layers:
                if handle not in places:
                    places[handle] = device_memory.opened(handle)
            addresses = [places[handle][0] + offset for handle, offset in memory.layers]
            span = (memory.count - 1) * memory.stride_bytes + memory.page_bytes
            if any(not 0 <= offset <= places[handle][1] - span for handle, offset in memory.layers):
                raise HandoverError("an engine's blocks do not lie in the allocation that it names")
        except HandoverError:
            for base, _ in places.values():
                device_memory.closed(base)
            raise
        return _Opened(torch.tensor(addresses, dtype=torch.int64, device=self._device), [base for base, _ in places.values()])


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
