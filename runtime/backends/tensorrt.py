"""TensorRT: plans that `enat-export --tensorrt` built, the whole loop recorded as one CUDA graph and launched at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt

from ...errors import BackendError, InputError, first_line
from ..builds import Platform, choose_build, covering_profile
from ..interrupts import held_back
from ..manifest import Manifest
from . import Array
from .cuda import CudaDevice, device_facts, setting_up, use_device
from .device import Block, DeviceMemoryError, DeviceTensor
from .device_lane import DeviceLane, Record
from .lanes import DeviceBackend, Lanes

CONTEXTS = 512  # of records that a lane keeps; a run of 8 steps needs 25


def platform_of(index: int) -> Platform:
    """What plans for this GPU must be made for."""
    return Platform(trt.__version__, *device_facts(index))


class Logger(trt.ILogger):  # type: ignore[misc]
    """Takes down the first error that TensorRT reports since somebody listens, to be shown with the failure that it explains."""

    def __init__(self) -> None:
        super().__init__()
        self.own = threading.local()  # error: of the thread that asks
        self.first = ""  # of whichever thread: TensorRT builds with several

    def listen(self) -> None:
        self.own.error = self.first = ""

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            line = first_line(message)
            self.own.error = self.error or line
            self.first = self.first or line

    @property
    def error(self) -> str:
        """This thread's."""
        return getattr(self.own, "error", "")


LOGGER = Logger()  # TensorRT goes on using the first one that a process gives it


def failure(message: str) -> BackendError:
    """The error to raise where TensorRT failed, with its reason."""
    text = f"{message}: {LOGGER.error}"
    short = "out of memory" in text or "OutOfMemory" in text
    return (DeviceMemoryError if short else BackendError)(text)


def start_runtime() -> Any:
    """TensorRT's runtime. Raises BackendError where it cannot start."""
    LOGGER.listen()
    try:
        return trt.Runtime(LOGGER)
    except TypeError as error:  # what its bindings raise where they are given nothing
        raise BackendError(f"TensorRT {trt.__version__} cannot start: {LOGGER.error or error}") from error


def load_plan(runtime: Any, path: Path) -> Any:
    """A plan's ICudaEngine. Raises BackendError where TensorRT refuses it."""
    LOGGER.listen()
    with held_back():
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise failure(f"{path}: TensorRT {trt.__version__} cannot load it")
    return engine


def refit(engine: Any, graph: Path, data_of: Path, changed: Collection[str] = ()) -> None:
    """Gives a plan the weights of a graph. data_of: the graph beside which its external data lies. Raises BackendError, and where the
    plan would keep any weights that are named as changed."""
    LOGGER.listen()
    refitter = trt.Refitter(engine, LOGGER)
    kept = sorted(set(changed) - set(refitter.get_all_weights()))
    if kept:
        raise BackendError(f"{data_of}: its {kept[0]} differs, and the plan takes no other in place of it; build it anew, without --refit")
    parser = trt.OnnxParserRefitter(refitter, LOGGER)
    with held_back():
        done = parser.refit_from_bytes(graph.read_bytes(), str(data_of)) and refitter.refit_cuda_engine()
    if not done:
        raise failure(f"{graph}: TensorRT could not take the weights from it")


class Plans:
    """The plans of an engine's build, loaded when first run, and shared by all lanes."""

    def __init__(self, manifest: Manifest, platform: Platform, setting_up: AbstractContextManager[object]) -> None:
        """setting_up: of the device."""
        self.manifest = manifest
        self.setting_up = setting_up
        self.build = choose_build(manifest, platform)
        self.runtime = start_runtime()
        if self.build.options.get("version_compatible"):
            self.runtime.engine_host_code_allowed = True  # such plans bring a runtime of their own
        self.engines: dict[str, Any] = {}

    def engine(self, graph: str) -> Any:
        """A graph's ICudaEngine. Raises BackendError where TensorRT refuses the plan."""
        if (loaded := self.engines.get(graph)) is not None:
            return loaded
        with self.setting_up:
            if graph not in self.engines:
                if graph not in self.build.graphs:
                    raise BackendError(f"{self.manifest.folder}: the TensorRT build {self.build.id} has no {graph}")
                plan = self.build.plan(graph)
                with self.manifest.unchanged({plan: self.build.files[plan]}, verify=True):  # it is a program
                    engine = load_plan(self.runtime, self.manifest.root / plan)
                if graph == "sampler" and engine.get_tensor_location("keep") != trt.TensorLocation.HOST:
                    raise BackendError(f"{self.manifest.folder}: the TensorRT build {self.build.id} wants keep on the device")
                source = self.build.graphs[graph].weights
                if source is not None:
                    with self.manifest.unchanged(self.build.weights_of(graph, self.manifest)):
                        refit(engine, self.manifest.root / source, self.manifest.root / self.build.data_of(graph))
                self.engines[graph] = engine
            return self.engines[graph]


class TensorRTBackend(DeviceBackend["TensorRTLane"]):
    """Lanes that run plans."""

    name = "tensorrt"

    def __init__(self, manifest: Manifest, device: str, threads: int | None = None, slots: int = 1) -> None:
        index = use_device(device)
        self.device = f"cuda:{index}"
        self.plans = plans = Plans(manifest, platform_of(index), setting_up(index))
        super().__init__(Lanes(lambda: TensorRTLane(manifest, CudaDevice(index), plans), slots, plans.engines.clear))

    def try_graphs(self) -> None:
        """TensorRT may refuse a plan, and the GPU have no room for it: those that pictures take, which the first ones load anyway."""
        for graph in self.plans.build.graphs:
            if graph != "image_encoder":
                self.plans.engine(graph)


@dataclass
class Context:
    """An execution context, the shapes that it is set to, whether it has run with them, and the scratch memory that they take."""

    execution: Any
    profile: int
    shapes: Mapping[str, tuple[int, ...]] | None = None
    ran: bool = False
    scratch: Block | None = None


class TensorRTLane(DeviceLane):
    """One stream, scratch memory that its contexts share, and contexts: one for each profile, whose shapes change from run to run; and for
    each program that is to be recorded its own, one for each of its launches, as a record goes on using what it was made with.
    """

    def __init__(self, manifest: Manifest, device: CudaDevice, plans: Plans) -> None:
        super().__init__(manifest, device, plans.build.options["max_batch"], "this TensorRT build (--max-batch)")
        self.plans = plans
        self.stream = device.stream
        self.contexts: dict[tuple[str, int], Context] = {}
        self.scratch: Block | None = None
        self.numbers: dict[int, Array] = {}  # where TensorRT reads `keep`, on the host; never written again

    def scratch_of_image(self, graphs: Iterable[str]) -> float:
        """Contexts share their scratch memory, which TensorRT names for the largest batch. Loads their plans, which take memory as well."""
        return max(self.plans.engine(graph).device_memory_size_v2 for graph in graphs) / self.plans.build.options["max_batch"]

    def modulation_shapes(self) -> Mapping[str, tuple[int, ...]]:
        engine = self.plans.engine("condition")
        return {name: tuple(engine.get_tensor_shape(name))[1:] for name in ("encoder_modulation", "decoder_modulation")}

    def execute(self, graph: str, inputs: Mapping[str, DeviceTensor | Array], outputs: Mapping[str, DeviceTensor]) -> None:
        LOGGER.listen()
        context = self.context(graph, inputs)
        execution = context.execution
        for name, tensor in {**inputs, **outputs}.items():
            if isinstance(tensor, DeviceTensor):
                self.check(execution.set_tensor_address(name, tensor.address), f"{graph}: TensorRT does not take memory for {name}")
        # With new shapes it may load kernels.
        with contextlib.nullcontext() if context.ran else self.device.setting_up:
            self.check(execution.execute_async_v3(self.stream), f"{graph}: TensorRT failed")
        context.ran = True

    def check(self, done: bool, message: str) -> None:
        if not done:
            raise failure(message)

    def context(self, graph: str, inputs: Mapping[str, DeviceTensor | Array]) -> Context:
        """A context that is set to the inputs' shapes. A record needs one that has run before: TensorRT defers work to the first run."""
        values = {name: int(array) for name, array in inputs.items() if isinstance(array, np.ndarray)}
        shapes = {name: (values[name],) if name in values else tensor.shape for name, tensor in inputs.items()}
        own, number = (self.running.executions, self.running.launches) if self.running else ({}, 0)
        if self.running:
            self.running.launches += 1
        if number in own:
            context: Context = own[number]
            self.give_scratch(context)
            return context
        if self.recording:
            raise BackendError(f"{graph}: no execution context has run with its shapes")
        profile = self.profile_for(graph, shapes)
        if self.running and self.make_room():
            context = own[number] = self.arena.retried(lambda: self.new_context(graph, profile))
        else:
            context = self.contexts.get((graph, profile)) or self.arena.retried(lambda: self.new_context(graph, profile))
        if context.shapes != shapes:
            self.set_shapes(context, graph, shapes, values)
        self.give_scratch(context)
        if number not in own:
            self.contexts[graph, profile] = context  # now that nothing makes the lane forget them before it is launched
        return context

    def profile_for(self, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
        profile = covering_profile(self.plans.build.graphs[graph].profiles, shapes)
        if profile is None:
            found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise InputError(f"{graph}: no profile of this TensorRT build covers {found}; build it again: enat-export --tensorrt")
        return profile

    def make_room(self) -> bool:
        """Whether there is room for one more context of the program that runs; older records are dropped for it."""
        mine = len(self.running.executions) if self.running else 0
        while self.kept and mine + sum(len(record.executions) for record in self.kept.values()) >= CONTEXTS:
            self.kept.popitem(last=False)
        return mine < CONTEXTS

    def new_context(self, graph: str, profile: int) -> Context:
        engine = self.plans.engine(graph)
        LOGGER.listen()
        with self.device.setting_up, held_back():
            execution = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if execution is None:
                raise DeviceMemoryError(f"{graph}: TensorRT made no execution context: {LOGGER.error}")
            done = execution.set_optimization_profile_async(profile, self.stream)
        self.check(done, f"{graph}: TensorRT does not take its profile {profile}")
        return Context(execution, profile)

    def set_shapes(self, context: Context, graph: str, shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, int]) -> None:
        LOGGER.listen()
        execution = context.execution
        if context.shapes is not None:
            self.device.synchronize()  # its last run may be under way
            context.shapes = None
        context.ran = False
        for name, shape in shapes.items():
            if name in values:
                number = self.numbers.setdefault(values[name], np.array([values[name]], np.int64))
                done = execution.set_tensor_address(name, number.ctypes.data)
            else:
                done = execution.set_input_shape(name, shape)
            self.check(done, f"{graph}: TensorRT does not take {name} {list(shape)}")
        try:
            with held_back():
                missing = execution.infer_shapes()
        except RuntimeError as error:
            raise BackendError(f"{graph}: TensorRT does not take its shapes: {LOGGER.error or error}") from error
        self.check(not missing, f"{graph}: TensorRT does not take the shapes of {', '.join(missing or ())}")
        # 0 is what it gives where it fails, too.
        size = execution.update_device_memory_size_for_shapes()
        self.make_scratch(size or self.plans.engine(graph).get_device_memory_size_for_profile_v2(context.profile))
        context.shapes, context.scratch = shapes, None

    def make_scratch(self, size: int) -> None:
        """Makes sure of memory for a context's own use. They run one after the other, and share it: where one needs more, the others get
        the larger piece when they run next, but for those of records, which go on using what they were made with.
        """
        if self.scratch is not None and self.scratch.size >= size:
            return
        self.device.synchronize()  # contexts that use the smaller one
        for context in self.contexts.values():
            context.shapes = context.scratch = None
        for context in self.running.executions.values() if self.running else ():
            context.scratch = None
        self.scratch = None  # before there is another one, for which memory may be short
        self.scratch = self.arena.take(size)

    def give_scratch(self, context: Context) -> None:
        """Has a context use the lane's scratch memory, if it has none; whoever took that away has waited for what the context launched."""
        assert self.scratch is not None
        if context.scratch is None:
            LOGGER.listen()
            context.execution.set_device_memory(self.scratch.address, self.scratch.size)
            self.check(not LOGGER.error, "TensorRT does not take its scratch memory")  # it tells in no other way
            context.scratch = self.scratch

    def settled(self, record: Record) -> bool:
        """Contexts are to have run with the memory that they will be recorded with."""
        return all(context.scratch is not None for context in record.executions.values())

    def forget(self) -> bool:
        if self.recording:
            return False
        self.device.synchronize()  # contexts must outlive what they launched, those of records too
        with self.device.setting_up:  # they give memory back, for which the whole device may be waited
            self.contexts.clear()
            if not self.running:  # whose contexts hold it
                self.scratch = None
            return super().forget()
