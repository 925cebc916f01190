"""Lanes whose tensors stay on a device: memory used again in the order of one stream, and records of what was launched."""

from __future__ import annotations

import contextlib
import math
import traceback
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import BackendError, InputError
from ..manifest import Manifest
from . import Array, Program
from .contract import output_shapes
from .device import ALIGNMENT, Arena, Device, DeviceMemoryError, DeviceTensor, NoDevice, rounded

MEMORY_SHARE = 0.8  # of what is free that tensors may take: backends need some for themselves
RECORDS = 16  # that a lane keeps; each holds a program's inputs and outputs
TRIES = 2  # to make a record: what others do on the device may spoil one


@dataclass
class Record:
    """A program that ran once: its inputs, where they are kept, and from the second run on what launches it.

    executions: what the backend made for its launches of graphs, by their number in a run, and for nothing else. launches: of the run
    that is under way, so far. tries: that recording it may still take.
    """

    inputs: dict[str, DeviceTensor]
    executions: dict[int, Any] = field(default_factory=dict)
    launches: int = 0
    launch: Callable[[], None] | None = None
    outputs: Sequence[DeviceTensor] = ()
    tries: int = TRIES


class DeviceLane(ABC):
    """One batch's tensors, memory and records on a device. Backends say how a graph is executed."""

    records = True

    def __init__(self, manifest: Manifest, device: Device, most_images: int | None = None, of: str = "") -> None:
        """most_images: at once, and `of` what makes this limit."""
        self.manifest = manifest
        self.device = device
        self.most_images, self.limited_by = most_images, of
        self.arena = Arena(device, self.forget)
        self.staging = np.empty(0, np.uint8)
        self.kept: OrderedDict[Hashable, Record] = OrderedDict()
        self.running: Record | None = None  # whose program runs, where it is one that is to be recorded
        self.recording = False
        self.dry = False  # nothing is launched, only memory counted
        self.counted: set[str] = set()  # graphs that were to run meanwhile

    @abstractmethod
    def execute(self, graph: str, inputs: Mapping[str, DeviceTensor | Array], outputs: Mapping[str, DeviceTensor]) -> None:
        """Launches a graph. NumPy arrays among the inputs are values that the host needs."""

    @abstractmethod
    def scratch_of_image(self, graphs: Iterable[str]) -> float | None:
        """Bytes for each image of a batch that graphs take beside their tensors; None where the backend does not tell."""

    @abstractmethod
    def modulation_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the condition graph's outputs beyond the first axis."""

    def new(self, shape: Sequence[int], dtype: Any) -> DeviceTensor:
        dtype = np.dtype(dtype)
        block = self.arena.take(math.prod(shape) * dtype.itemsize)
        return DeviceTensor(block.address, tuple(map(int, shape)), dtype, block)

    def upload(self, array: Array) -> DeviceTensor:
        return self.upload_all({"": array})[""]

    def upload_all(self, arrays: Mapping[str, Array]) -> dict[str, DeviceTensor]:
        """All arrays in one copy."""
        offsets, size = pack(arrays)
        block = self.arena.take(size)
        tensors = {name: DeviceTensor(block.address + offsets[name], array.shape, array.dtype, block) for name, array in arrays.items()}
        self.refill(tensors, arrays)
        return tensors

    def refill(self, tensors: Mapping[str, DeviceTensor], arrays: Mapping[str, Array]) -> None:
        """Copies arrays to where arrays of the same shapes were uploaded."""
        offsets, size = pack(arrays)
        self.device.synchronize()  # an earlier copy may still read the staging memory
        staging = self.stage(size)
        for name, array in arrays.items():
            staging[offsets[name] : offsets[name] + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if size:
            self.device.copy_in(min(tensor.address for tensor in tensors.values()), staging[:size])

    def stage(self, size: int) -> Array:
        if len(self.staging) < size:
            self.staging = np.empty(0, np.uint8)  # the device takes the old one back, and may have no other
            self.staging = self.device.pinned(rounded(size))
        return self.staging

    def download(self, tensor: DeviceTensor) -> Array:
        staging = self.stage(tensor.nbytes)[: tensor.nbytes]
        if tensor.nbytes:
            self.device.copy_out(staging, tensor.address)
        self.device.synchronize()
        return staging.copy().view(tensor.dtype).reshape(tensor.shape)

    def first_rows(self, tensor: DeviceTensor, rows: int) -> DeviceTensor:
        return DeviceTensor(tensor.address, (rows, *tensor.shape[1:]), tensor.dtype, tensor.block)

    def concatenate(self, tensors: Sequence[DeviceTensor]) -> DeviceTensor:
        first = tensors[0]
        result = self.new((first.shape[0], sum(one.shape[1] for one in tensors), *first.shape[2:]), first.dtype)
        pitch, offset = row_bytes(result), 0
        for one in tensors:
            width = row_bytes(one)
            if one.nbytes:
                self.device.copy_rows(result.address + offset, pitch, one.address, width, width, one.shape[0])
            offset += width
        return result

    def run(self, graph: str, inputs: Mapping[str, DeviceTensor | Array]) -> list[DeviceTensor]:
        shapes = output_shapes(self.manifest, graph, inputs, self.modulation_shapes)
        outputs = {name: self.new(shape, dtype) for name, (shape, dtype) in shapes.items()}
        if self.dry:
            self.counted.add(graph)
        else:
            self.execute(graph, inputs, outputs)
        return list(outputs.values())

    def compute(self, key: Hashable | None, arrays: Mapping[str, Array], program: Program) -> list[Array]:
        if self.most_images and (batch := batch_of(arrays)) > self.most_images:
            raise InputError(f"{batch} images at once are too many for {self.limited_by}; expected at most {self.most_images}")
        try:
            if key is None or not self.records:
                return [self.download(tensor) for tensor in program(self.upload_all(arrays))]
            return self.replay(key, arrays, program)
        except DeviceMemoryError as error:
            found = str(error)
            traceback.clear_frames(error.__traceback__)  # they hold tensors
        self.forget()
        raise BackendError(f"{found}; {self.advice(arrays, program)}")

    def replay(self, key: Hashable, arrays: Mapping[str, Array], program: Program) -> list[Array]:
        """Runs a program the first time, records it the second time, and launches the record from then on.

        The first run makes everything that a record may not: executions for new shapes, memory.
        """
        if key not in self.kept:
            with self.device.setting_up:
                return self.run_first(key, arrays, program)
        record = self.kept[key]
        self.kept.move_to_end(key)
        self.refill(record.inputs, arrays)
        if record.launch is None and record.tries:
            with self.device.setting_up:
                self.record(key, record, program)
        if record.launch is None:
            return [self.download(tensor) for tensor in program(record.inputs)]
        record.launch()
        return [self.download(tensor) for tensor in record.outputs]

    def run_first(self, key: Hashable, arrays: Mapping[str, Array], program: Program) -> list[Array]:
        """Runs a program that is to be recorded."""
        while len(self.kept) >= RECORDS:
            self.kept.popitem(last=False)
        record = Record(self.upload_all(arrays))
        try:
            with self.running_for(record):
                outputs = self.run_recorded(record, program)
                if not self.settled(record):
                    outputs = self.run_recorded(record, program)
                result = [self.download(tensor) for tensor in outputs]
        except BaseException:
            self.device.synchronize()  # what was made for it must outlive what it launched
            raise
        self.kept[key] = record
        return result

    def run_recorded(self, record: Record, program: Program) -> Sequence[DeviceTensor]:
        """Runs a program on what was made for it, or makes that."""
        record.launches = 0
        return program(record.inputs)

    def settled(self, record: Record) -> bool:
        """Whether what the first run made is as it will be when it is recorded."""
        return True

    def record(self, key: Hashable, record: Record, program: Program) -> None:
        """Records a program that ran once. Where that fails it is run graph by graph; where it fails again, or for want of memory, which
        is not given back meanwhile, for good, with a warning."""

        def launch() -> None:
            record.outputs = self.run_recorded(record, program)

        self.recording = True
        try:
            with self.running_for(record):
                record.launch = self.device.record(launch)
        except BaseException as error:
            if not isinstance(error, BackendError):
                del self.kept[key]
                raise
            record.outputs, record.tries = (), 0 if isinstance(error, DeviceMemoryError) else record.tries - 1
            if not record.tries:
                record.executions.clear()
                warnings.warn(f"not recorded as one launch, its graphs are launched one by one: {error}", RuntimeWarning, stacklevel=2)
        finally:
            self.recording = False

    @contextlib.contextmanager
    def running_for(self, record: Record) -> Iterator[None]:
        self.running = record
        try:
            yield
        finally:
            self.running = None

    def forget(self) -> bool:
        """Drops all records, so that memory may be given back; not while one is being made."""
        if not self.recording:
            self.kept.clear()
        return not self.recording

    def advice(self, arrays: Mapping[str, Array], program: Program) -> str:
        """Which batch would fit, by what the program's tensors and the graphs take together at their peak."""
        self.arena.free_unused()
        counter = NoDevice()
        mine = self.device, self.arena, self.staging
        self.device, self.arena, self.dry, self.counted = counter, Arena(counter), True, set()
        try:
            program(self.upload_all(arrays))
        finally:
            (self.device, self.arena, self.staging), self.dry = mine, False
        try:
            scratch = self.scratch_of_image(self.counted)  # may load what takes memory too
        except DeviceMemoryError:
            scratch = None
        available = self.device.free_memory() + self.arena.total
        batch = batch_of(arrays)
        needed = counter.peak + batch * (scratch or 0)
        fitting = min(int(MEMORY_SHARE * batch * available / needed), batch // 2)
        found = f"{batch} at once need more than {needed / 2**20:.0f} MiB, {available / 2**20:.0f} MiB are free"
        if not fitting:
            return f"{found}; not even one fits"
        return f"{found}; a batch of {fitting} {'may fit' if scratch is None else 'fits'}"

    def enter(self) -> None:
        self.device.enter()

    def close(self) -> None:
        self.enter()
        self.forget()
        self.arena.close()
        self.device.close()


def batch_of(arrays: Mapping[str, Array]) -> int:
    """How many images a program is about, by what it begins with."""
    return len(arrays["images" if "images" in arrays else "positions"])


def pack(arrays: Mapping[str, Array]) -> tuple[dict[str, int], int]:
    """Offsets of arrays that lie one after the other in memory, and the bytes of all. Empty ones have places of their own too."""
    offsets, size = {}, 0
    for name, array in arrays.items():
        offsets[name] = size
        size += -(-max(1, array.nbytes) // ALIGNMENT) * ALIGNMENT
    return offsets, size


def row_bytes(tensor: DeviceTensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
