"""Host memory in place of a GPU's: lanes, arenas, bindings and records run for real, on ONNX Runtime's CPU kernels.

What it cannot tell is whether CUDA and TensorRT do what is asked of them; tests marked `gpu` do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort

from enat.runtime.backends import Array
from enat.runtime.backends.device import ALIGNMENT, DeviceMemoryError, DeviceTensor
from enat.runtime.backends.lanes import DeviceBackend, LaneBackend, Lanes
from enat.runtime.backends.onnxruntime_cuda import OrtLane
from enat.runtime.backends.sessions import CPU, Sessions
from enat.runtime.manifest import Manifest


class HostDevice:
    """Pieces of host memory by address, of `limit` bytes in all; operations run at once, or are recorded."""

    name = "host"
    setting_up: AbstractContextManager[object] = threading.RLock()

    def __init__(self, limit: int = 2**40) -> None:
        self.limit = limit
        self.pieces: dict[int, Array] = {}
        self.recorded: list[Callable[[], Any]] | None = None

    def enter(self) -> None: ...
    def synchronize(self) -> None:
        assert self.recorded is None, "a record may not wait"

    def close(self) -> None: ...

    def allocate(self, size: int) -> int:
        if size > self.free_memory():
            raise DeviceMemoryError("host: out of memory")
        room = np.full(size + ALIGNMENT, 0xA5, np.uint8)  # so that what is read before it is written shows
        first = -room.ctypes.data % ALIGNMENT
        address = room.ctypes.data + first
        self.pieces[address] = room[first : first + size]
        return address

    def free(self, address: int) -> None:
        assert self.recorded is None
        del self.pieces[address]

    def free_memory(self) -> int:
        return self.limit - sum(map(len, self.pieces.values()))

    def pinned(self, size: int) -> Array:
        return np.empty(size, np.uint8)

    def at(self, address: int, size: int) -> Array:
        """Memory that must lie within one piece."""
        for start, piece in self.pieces.items():
            if start <= address and address + size <= start + len(piece):
                return piece[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address} were never allocated")

    def do(self, operation: Callable[[], Any]) -> None:
        if self.recorded is None:
            operation()
        else:
            self.recorded.append(operation)

    def copy_in(self, address: int, source: Array) -> None:
        self.do(lambda: np.copyto(self.at(address, len(source)), source))

    def copy_out(self, destination: Array, address: int) -> None:
        self.do(lambda: np.copyto(destination, self.at(address, len(destination))))

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        assert width <= to_pitch and width <= source_pitch

        def copy() -> None:
            for row in range(rows):
                np.copyto(self.at(to + row * to_pitch, width), self.at(source + row * source_pitch, width))

        self.do(copy)

    def record(self, launch: Callable[[], Any]) -> Callable[[], None]:
        self.recorded = []
        try:
            launch()
            recorded = self.recorded
        finally:
            self.recorded = None

        def run() -> None:
            for operation in recorded:
                operation()

        return run


class HostLane(OrtLane):
    """Runs that can be recorded: a record keeps addresses, and not the memory, as a CUDA graph does."""

    device: HostDevice
    records = True

    def scratch_of_image(self, graphs: Iterable[str]) -> float:  # type: ignore[override]
        return 0  # ONNX Runtime's own memory is none of the device's

    def execute(self, graph: str, inputs: Mapping[str, DeviceTensor | Array], outputs: Mapping[str, DeviceTensor]) -> None:
        run = super().execute
        bare = [
            {name: tensor if isinstance(tensor, np.ndarray) else replace(tensor, block=None) for name, tensor in group.items()}
            for group in (inputs, outputs)
        ]
        for tensor in bare[1].values():
            self.device.at(tensor.address, tensor.nbytes)
        self.device.do(lambda: run(graph, *bare))


class HostBackend(DeviceBackend[HostLane]):
    name = "host"
    device = "cpu"

    def __init__(self, manifest: Manifest, slots: int = 1, limit: int = 2**40, options: ort.SessionOptions | None = None) -> None:
        self.sessions = sessions = Sessions(manifest.reading, options or ort.SessionOptions(), lambda graph: CPU)
        super().__init__(Lanes(lambda: HostLane(manifest, HostDevice(limit), sessions, "cpu"), slots, sessions.close))


def lanes_made(backend: LaneBackend[Any]) -> list[Any]:
    """Every lane that the backend makes from now on."""
    made: list[Any] = []
    make = backend.lanes.make
    backend.lanes.make = lambda: made.append(make()) or made[-1]  # type: ignore[func-returns-value]
    return made
