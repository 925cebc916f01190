"""Memory of a device, and what lanes need of one."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from ...errors import BackendError
from . import Array

ALIGNMENT = 512  # bytes, of every tensor

T = TypeVar("T")


class DeviceMemoryError(BackendError):
    """The device's memory is used up."""


class Device(Protocol):
    """What lanes need of a device: memory, and one stream that runs what it is given in order."""

    name: str
    # Held where a record is made, and where a lane does what waits for the whole device, which records of other lanes would not survive:
    # loads programs, runs them for the first time, gives memory back. One for all lanes on the device; may be held several times.
    setting_up: AbstractContextManager[object]

    def enter(self) -> None:
        """Makes this thread use the device."""

    def allocate(self, size: int) -> int:
        """Address of new memory. Raises DeviceMemoryError."""

    def free(self, address: int) -> None:
        """Gives memory back, when all work that was launched is done."""

    def free_memory(self) -> int:
        """Bytes that could be allocated."""

    def pinned(self, size: int) -> Array:
        """Host memory, uint8 [size], from and to which copies run asynchronously, in place of what was given before."""

    def copy_in(self, address: int, source: Array) -> None: ...

    def copy_out(self, destination: Array, address: int) -> None: ...

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copies `rows` pieces of `width` bytes, which lie a pitch apart."""

    def synchronize(self) -> None:
        """Waits for all that was launched."""

    def record(self, launch: Callable[[], Any]) -> Callable[[], None]:
        """Records what `launch` launches, in place of running it → what runs the record."""

    def close(self) -> None: ...


class Block:
    """A piece of an arena's memory; back in the arena when nothing refers to it any more."""

    def __init__(self, arena: Arena, address: int, size: int) -> None:
        self.arena, self.address, self.size = arena, address, size

    def __del__(self) -> None:
        self.arena.put_back(self.address, self.size)


@dataclass(frozen=True)
class DeviceTensor:
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    block: Block  # keeps the memory

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Arena:
    """The memory of one lane. As its work runs in order, memory that nothing refers to may be written anew at once: whatever still
    reads it was launched earlier. A record may go on using it, so it is given back only when there are no records."""

    def __init__(self, device: Device, reclaim: Callable[[], bool] = lambda: True) -> None:
        self.device = device
        self.reclaim = reclaim  # called where memory is short: whether unused blocks may be freed
        self.unused: dict[int, list[int]] = {}  # size → addresses
        self.returned: deque[tuple[int, int]] = deque()  # sizes and addresses, by whichever thread let go of them
        self.total = 0
        self.closed = False

    def take(self, size: int) -> Block:
        """A block of at least `size` bytes. Raises DeviceMemoryError."""
        size = rounded(size)
        self.collect()
        fitting = [found for found, addresses in self.unused.items() if addresses and size <= found <= 2 * size]
        if fitting:
            size = min(fitting)
            return Block(self, self.unused[size].pop(), size)
        address = self.retried(lambda: self.device.allocate(size))
        self.total += size
        return Block(self, address, size)

    def retried(self, make: Callable[[], T]) -> T:
        """What `make` makes; where memory is short for it, once unused blocks are freed."""
        try:
            return make()
        except DeviceMemoryError:
            if not self.reclaim():
                raise
        self.free_unused()
        return make()

    def put_back(self, address: int, size: int) -> None:
        self.returned.append((size, address))
        if self.closed:
            self.free_unused()

    def collect(self) -> None:
        with contextlib.suppress(IndexError):  # that is all
            while True:
                size, address = self.returned.popleft()
                self.unused.setdefault(size, []).append(address)

    def close(self) -> None:
        """Frees what is unused, and from now on whatever nothing refers to any more: an exception may still hold a batch's tensors."""
        self.closed = True
        self.free_unused()

    def free_unused(self) -> None:
        """Whatever ends it before it is done: what was freed is no longer listed."""
        self.collect()
        for size, addresses in list(self.unused.items()):
            while addresses:
                try:
                    address = addresses.pop()
                except IndexError:  # of a closed arena, which several threads free at once
                    break
                self.total -= size
                self.device.free(address)


def rounded(size: int) -> int:
    """Up to a multiple of an eighth of the power of two below, so that there are few different sizes."""
    grain = max(ALIGNMENT, 1 << max(0, size.bit_length() - 4))
    return max(1, -(-size // grain)) * grain


class NoDevice:
    """In place of a device where only the memory that a program would take is of interest. An arena asks for more only when all that it
    has is in use, so what was allocated in all is the peak."""

    name = "none"
    setting_up: AbstractContextManager[object] = contextlib.nullcontext()

    def __init__(self) -> None:
        self.peak = 0

    def allocate(self, size: int) -> int:
        self.peak += size
        return 0

    def free_memory(self) -> int:
        return 0

    def pinned(self, size: int) -> Array:
        return np.empty(size, np.uint8)

    def enter(self) -> None: ...
    def free(self, address: int) -> None: ...
    def copy_in(self, address: int, source: Array) -> None: ...
    def copy_out(self, destination: Array, address: int) -> None: ...
    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None: ...
    def synchronize(self) -> None: ...
    def close(self) -> None: ...

    def record(self, launch: Callable[[], Any]) -> Callable[[], None]:
        return lambda: None
