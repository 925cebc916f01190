"""A CUDA device and one stream of it, by cuda-python's bindings of the CUDA runtime."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart

from ...errors import BackendError, InputError
from . import Array, parse_device
from .device import DeviceMemoryError

LEAST_CAPABILITY = 7.5  # compute capability: CUDA 13, and TensorRT from 10.13 on, serve Turing and what came after it
KINDS = cudart.cudaMemcpyKind
SETTING_UP: dict[int, threading.RLock] = {}  # one for each device: Device.setting_up


def call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Calls the CUDA runtime → what it returns beside the error. Raises BackendError, DeviceMemoryError."""
    error, *results = function(*arguments)
    if error != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(error)
        message = f"CUDA: {text.decode()} ({function.__name__})"
        raise DeviceMemoryError(message) if error == cudart.cudaError_t.cudaErrorMemoryAllocation else BackendError(message)
    return results[0] if len(results) == 1 else tuple(results)


def device_index(device: str) -> int:
    """The number in cuda or cuda:N. Raises InputError for other words, BackendError without a driver or such a device, or where it is too
    old."""
    kind, index = parse_device(device)
    if kind != "cuda":
        raise InputError(f"expected a GPU, cuda or cuda:N, got the device {device!r}")
    try:
        count = call(cudart.cudaGetDeviceCount)
    except BackendError as error:
        raise BackendError(f"{device}: no GPU that CUDA can use: {error}; nvidia-smi shows drivers and devices") from error
    if index >= count:
        raise BackendError(f"{device}: there is no such GPU; {count} found, cuda:0{f' to cuda:{count - 1}' if count > 1 else ''}")
    name, capability = device_facts(index)
    if float(capability) < LEAST_CAPABILITY:
        raise BackendError(f"{device}: {name} is too old: its compute capability is {capability}, expected {LEAST_CAPABILITY} or more")
    return index


def use_device(device: str) -> int:
    """Makes cuda or cuda:N this thread's current device → its number. Raises what `device_index` raises."""
    index = device_index(device)
    call(cudart.cudaSetDevice, index)
    return index


def device_facts(index: int) -> tuple[str, str]:
    """Name and compute capability ("NVIDIA H200", "9.0") of a device."""
    properties = call(cudart.cudaGetDeviceProperties, index)
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return name, f"{properties.major}.{properties.minor}"


def setting_up(index: int) -> threading.RLock:
    """What all lanes on a device share: Device.setting_up."""
    return SETTING_UP.setdefault(index, threading.RLock())


class CudaDevice:
    """A stream of a GPU, and memory. CUDA keeps a current device for each thread: `enter` makes it this one."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.name = f"cuda:{index}"
        self.setting_up: AbstractContextManager[object] = setting_up(index)
        self.enter()
        self.stream = int(call(cudart.cudaStreamCreateWithFlags, cudart.cudaStreamNonBlocking))
        self.page: int | None = None  # of host memory

    def enter(self) -> None:
        call(cudart.cudaSetDevice, self.index)

    def allocate(self, size: int) -> int:
        return int(call(cudart.cudaMalloc, size))

    def free(self, address: int) -> None:
        with self.setting_up:
            call(cudart.cudaFree, address)  # waits for the device

    def free_memory(self) -> int:
        free, _ = call(cudart.cudaMemGetInfo)
        return int(free)

    def pinned(self, size: int) -> Array:
        self.free_page()
        self.page = int(call(cudart.cudaMallocHost, size))
        return np.ctypeslib.as_array(ctypes.cast(self.page, ctypes.POINTER(ctypes.c_uint8)), (size,))

    def free_page(self) -> None:
        if self.page is not None:
            page, self.page = self.page, None
            self.synchronize()  # copies may use it
            with self.setting_up:
                call(cudart.cudaFreeHost, page)

    def copy_in(self, address: int, source: Array) -> None:
        call(cudart.cudaMemcpyAsync, address, source.ctypes.data, source.nbytes, KINDS.cudaMemcpyHostToDevice, self.stream)

    def copy_out(self, destination: Array, address: int) -> None:
        call(cudart.cudaMemcpyAsync, destination.ctypes.data, address, destination.nbytes, KINDS.cudaMemcpyDeviceToHost, self.stream)

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        kind = KINDS.cudaMemcpyDeviceToDevice
        call(cudart.cudaMemcpy2DAsync, to, to_pitch, source, source_pitch, width, rows, kind, self.stream)

    def synchronize(self) -> None:
        call(cudart.cudaStreamSynchronize, self.stream)

    def record(self, launch: Callable[[], Any]) -> Callable[[], None]:
        """A CUDA graph of what `launch` launches on the stream."""
        # Relaxed: other lanes may allocate meanwhile.
        call(cudart.cudaStreamBeginCapture, self.stream, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
        try:
            launch()
        except BaseException:
            _, graph = cudart.cudaStreamEndCapture(self.stream)  # the stream must leave the capture whatever happened
            if graph is not None:
                cudart.cudaGraphDestroy(graph)
            raise
        graph = call(cudart.cudaStreamEndCapture, self.stream)
        try:
            executable = CudaGraph(call(cudart.cudaGraphInstantiate, graph, 0))
        finally:
            call(cudart.cudaGraphDestroy, graph)
        return lambda: call(cudart.cudaGraphLaunch, executable.handle, self.stream)

    def close(self) -> None:
        self.synchronize()
        self.free_page()
        call(cudart.cudaStreamDestroy, self.stream)


class CudaGraph:
    """An executable CUDA graph, destroyed when nothing refers to it any more."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __del__(self) -> None:
        cudart.cudaGraphExecDestroy(self.handle)
