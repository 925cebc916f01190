"""TensorRT: plans that `enat-export --tensorrt` built, the whole loop recorded as one CUDA graph and launched at once."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt

from ...errors import BackendError, InputError
from ..builds import Platform, choose_build, covering_profile
from ..manifest import Manifest
from . import Array, Program
from .cuda import CudaDevice, device_facts, device_index
from .device import Block, DeviceMemoryError, DeviceTensor
from .device_lane import DeviceLane, Lanes, batch_of

CONTEXTS = 512  # that a lane keeps for single shapes; a recorded run of 8 steps needs 25


def platform_of(index: int) -> Platform:
    """What plans for this GPU must be made for."""
    return Platform(trt.__version__, *device_facts(index))


class Logger(trt.ILogger):  # type: ignore[misc]
    """Keeps TensorRT's last error, to be shown with the failure that it explains."""

    def __init__(self) -> None:
        super().__init__()
        self.error = ""

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.error = message.strip().splitlines()[0]


def load_plan(runtime: Any, path: Path, logger: Logger) -> Any:
    """A plan's ICudaEngine. Raises BackendError where TensorRT refuses it."""
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise BackendError(f"{path}: TensorRT {trt.__version__} cannot load it: {logger.error}")
    return engine


def refit(engine: Any, graph: Path, logger: Logger) -> None:
    """Gives a plan the weights of a graph. Raises BackendError."""
    refitter = trt.Refitter(engine, logger)
    if not trt.OnnxParserRefitter(refitter, logger).refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        raise BackendError(f"{graph}: TensorRT could not take the weights from it: {logger.error}")


class TensorRTBackend:
    """Plans, loaded when first run, and shared by all lanes."""

    name = "tensorrt"

    def __init__(self, manifest: Manifest, device: str, threads: int | None = None, slots: int = 1) -> None:
        index = device_index(device)
        self.device = f"cuda:{index}"
        self.manifest = manifest
        self.build = choose_build(manifest, platform_of(index))
        self.logger = Logger()
        self.runtime = trt.Runtime(self.logger)
        if self.build.options.get("version_compatible"):
            self.runtime.engine_host_code_allowed = True  # such plans bring a runtime of their own
        self.engines: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.lanes = Lanes(lambda: TensorRTLane(manifest, CudaDevice(index), self), slots)

    def lease(self) -> AbstractContextManager[DeviceLane]:
        return self.lanes.lease()

    def engine(self, graph: str) -> Any:
        """A graph's ICudaEngine. Raises BackendError where TensorRT refuses the plan."""
        with self.lock:
            if graph not in self.engines:
                if graph not in self.build.graphs:
                    raise BackendError(f"{self.manifest.folder}: the TensorRT build {self.build.id} has no {graph}")
                engine = load_plan(self.runtime, self.manifest.folder / self.build.plan(graph), self.logger)
                source = self.build.graphs[graph].weights
                if source is not None:
                    refit(engine, self.manifest.folder / source, self.logger)
                self.engines[graph] = engine
            return self.engines[graph]

    def close(self) -> None:
        self.lanes.close()
        self.engines.clear()


@dataclass
class Context:
    """An execution context set up for one set of shapes. keep: where TensorRT reads that number, on the host."""

    execution: Any
    scratch: Block
    keep: Array


class TensorRTLane(DeviceLane):
    """One stream, scratch memory that its contexts share, and a context for every set of shapes that it meets."""

    def __init__(self, manifest: Manifest, device: CudaDevice, backend: TensorRTBackend) -> None:
        super().__init__(manifest, device)
        self.backend = backend
        self.stream = device.stream
        self.contexts: dict[Any, Context] = {}
        self.scratch: Block | None = None

    def compute(self, key: Hashable | None, arrays: Mapping[str, Array], program: Program) -> list[Array]:
        batch, most = batch_of(arrays), self.backend.build.options["max_batch"]
        if batch > most:
            raise InputError(f"{batch} images at once are too many for this TensorRT build; expected at most {most} (--max-batch)")
        return super().compute(key, arrays, program)

    def modulation_shapes(self) -> Mapping[str, tuple[int, ...]]:
        engine = self.backend.engine("condition")
        return {name: tuple(engine.get_tensor_shape(name))[1:] for name in ("encoder_modulation", "decoder_modulation")}

    def execute(self, graph: str, inputs: Mapping[str, DeviceTensor | Array], outputs: Mapping[str, DeviceTensor]) -> None:
        context = self.context(graph, inputs)
        execution = context.execution
        for name, tensor in {**inputs, **outputs}.items():
            if isinstance(tensor, DeviceTensor):
                execution.set_tensor_address(name, tensor.address)
        if not execution.execute_async_v3(self.stream):
            raise BackendError(f"{graph}: TensorRT failed: {self.backend.logger.error}")

    def context(self, graph: str, inputs: Mapping[str, DeviceTensor | Array]) -> Context:
        """A context whose shapes are set. A record needs one that has run before: TensorRT defers work to the first run."""
        values = {name: int(array) for name, array in inputs.items() if isinstance(array, np.ndarray)}
        shapes = {name: (values[name],) if name in values else tensor.shape for name, tensor in inputs.items()}
        key = (graph, tuple(shapes.items()))
        if key not in self.contexts:
            if len(self.contexts) >= CONTEXTS:
                self.forget()  # all: records use them
            self.contexts[key] = self.new_context(graph, shapes, values)
        return self.contexts[key]

    def new_context(self, graph: str, shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, int]) -> Context:
        engine, build = self.backend.engine(graph), self.backend.build
        profile = covering_profile(build.graphs[graph].profiles, shapes)
        if profile is None:
            found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise InputError(f"{graph}: no profile of this TensorRT build covers {found}; build it again: enat-export --tensorrt")
        execution = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if execution is None:
            raise DeviceMemoryError(f"{graph}: TensorRT made no execution context: {self.backend.logger.error}")
        execution.set_optimization_profile_async(profile, self.stream)
        keep = np.array([values.get("keep", 0)], np.int64)
        for name, shape in shapes.items():
            if name in values:
                execution.set_tensor_address(name, keep.ctypes.data)
            else:
                execution.set_input_shape(name, shape)
        missing = execution.infer_shapes()
        if missing:
            raise BackendError(f"{graph}: TensorRT does not take the shapes of {', '.join(missing)}: {self.backend.logger.error}")
        scratch = self.scratch_of(execution.update_device_memory_size_for_shapes())
        execution.set_device_memory(scratch.address, scratch.size)
        return Context(execution, scratch, keep)

    def scratch_of(self, size: int) -> Block:
        """Memory for a context's own use. They run one after the other, and share it; a larger one is for contexts to come."""
        if self.scratch is None or self.scratch.size < size:
            self.scratch = self.arena.take(size)
        return self.scratch

    def forget(self) -> bool:
        free = super().forget()
        if free:
            self.device.synchronize()  # contexts must outlive what they launched
            self.contexts.clear()
            self.scratch = None
        return free
