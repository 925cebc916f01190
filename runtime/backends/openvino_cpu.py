"""OpenVINO on the CPU. A tensor is a NumPy array."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ...errors import BackendError
from ..manifest import Manifest
from . import Array
from .contract import output_shapes
from .int8_kernels import DEPTH as PROBE_DEPTH
from .int8_kernels import OVERFLOW, PROBE, saturate
from .lanes import LaneBackend, Lanes
from .numpy_lane import NumpyLane, failure
from .openvino_cache import CompiledGraph, GraphCache, reason
from .openvino_graphs import rewrite
from .signal_stack import kept_signal_stack

PROBE_ROWS = 32  # with fewer AMX would not be taken

FIRST, FOLLOWING = "condition", ("decoder", "sampler", "encoder", "image_decoder")  # what a batch of pictures runs, in this order

# Leading sizes of a graph's inputs in a run of its own, before anybody's. OpenVINO (2026.4.1) makes the kernel of an attention with its
# first run: one that was made for a single key, as where the first step reveals one token, computes wrongly with 16 and more, to the end.
FIRST_RUN = {"encoder": {"tokens": (2, 3), "positions": (2, 3), "features": (2, 2), "encoder_modulation": (2,)}}

MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
TRIM_SECONDS = 1.0


class ThreadedProcess:
    """The process that OpenVINO has started threads in. One that is forked from it has none of them, and whatever OpenVINO loads there
    would wait for them forever; graphs that are loaded already run in it, by one thread.
    """

    number: int | None = None

    @classmethod
    def check(cls) -> None:
        """Raises BackendError in a process that was forked from it."""
        if cls.number not in (None, os.getpid()):
            raise BackendError(
                "OpenVINO loaded graphs before this process was forked, and would wait here for threads that it had there; "
                "load engines only after the fork, or start processes by spawn"
            )

    @classmethod
    def enter(cls) -> None:
        """To be called before OpenVINO starts threads."""
        cls.check()
        cls.number = os.getpid()


@dataclass(frozen=True)
class Kernels:
    """What OpenVINO multiplies with on this machine."""

    saturate: bool = False  # sums of 8-bit products beyond 16 bits are lost
    tiles: bool = False  # AMX
    bfloat16: bool = False
    fast_bfloat16: bool = False  # faster than float32

    @classmethod
    def of(cls, core: ov.Core) -> Kernels:
        ThreadedProcess.enter()
        model = core.read_model(PROBE)
        model.reshape([PROBE_ROWS, PROBE_DEPTH])
        probe = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        names = [node.get_rt_info()["primitiveType"].astype(str) for node in probe.get_runtime_model().get_ordered_ops()]
        tiles = any("amx" in name for name in names)
        bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        # Intel's CPUs without AMX multiply bfloat16 by instructions of no higher rate than float32's. Not timed: on a busy machine the
        # answer might change from start to start, and the pictures of a seed with it.
        fast_bfloat16 = bfloat16 and (tiles or core.get_property("CPU", "FULL_DEVICE_NAME").startswith("AMD"))
        return cls(saturate(lambda x: probe(np.repeat(x, PROBE_ROWS, axis=0))[0]), tiles, bfloat16, fast_bfloat16)


def wants_bfloat16(precision: str, graph: str, kernels: Kernels) -> bool:
    """Whether a graph computes in bfloat16. In 8-bit engines that is what lies between the 8-bit products: a quarter of the network's time,
    where attention and the decoder's last layers multiply in it, and half of the image decoder's, where hardly anything does."""
    if precision == "int8" and graph == "image_decoder":
        return kernels.bfloat16
    return kernels.fast_bfloat16 and (precision == "fp16" or (precision == "int8" and graph in ("encoder", "decoder")))


def graph_options(precision: str, kernels: Kernels, threads: int | None, graph: str) -> dict[str, Any]:
    """OpenVINO's, to run a graph with."""
    # LATENCY: all threads work on one batch. By itself OpenVINO binds them to the machine's first cores: those of all processes that use
    # some of them; and every graph has threads of its own, which are bound anew when another's turn comes.
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    return options | {"INFERENCE_PRECISION_HINT": "bf16" if wants_bfloat16(precision, graph, kernels) else "f32"}


def computes_in_floats(precision: str, kernels: Kernels) -> bool:
    """Whether what an engine has in 8 bits is computed in floats. Weights of 7 bits would fit, into kernels that take twice as long."""
    return precision == "int8" and kernels.saturate


def graph_form(precision: str, kernels: Kernels, graph: str) -> dict[str, Any]:
    """What a graph is rewritten with before it is compiled."""
    bfloat16, floats = wants_bfloat16(precision, graph, kernels), computes_in_floats(precision, kernels)
    return {"tiles": kernels.tiles, "bfloat16": bfloat16, "floats": floats, "pictures": OpenVinoLane.pictures_at_once.get(graph)}


class CompiledGraphs:
    """Compiled graphs, each made when first run, and kept in a cache folder from then on: what is there is read beside what runs."""

    @kept_signal_stack()
    def __init__(self, manifest: Manifest, threads: int | None) -> None:
        ThreadedProcess.check()
        self.manifest = manifest
        self.following = [graph for graph in FOLLOWING if manifest.has(f"{graph}.onnx")]
        try:
            self.core = ov.Core()
            if "CPU" not in self.core.available_devices:
                raise BackendError(f"OpenVINO {ov.__version__} found no CPU that it can use")
            kernels = Kernels.of(self.core) if manifest.precision != "fp32" else Kernels()
            # No method of this object: it would keep itself alive, and with it all memory, until the cycle is looked for.
            self.options = functools.partial(graph_options, manifest.precision, kernels, threads)
            self.form = functools.partial(graph_form, manifest.precision, kernels)
            self.cache = GraphCache(self.core, manifest, self.options, self.form, [FIRST, *self.following])
        except RuntimeError as error:
            raise BackendError(f"OpenVINO {ov.__version__} cannot use this CPU: {reason(error)}") from error
        floats = computes_in_floats(manifest.precision, kernels)
        self.slower = f"{manifest.folder}: {OVERFLOW}, so OpenVINO computes as in float32" if floats else ""
        self.loader = ThreadPoolExecutor(2)
        self.loading: dict[str, Future[CompiledGraph]] = {}
        self.lock = threading.Lock()

    def load(self, graph: str) -> Future[CompiledGraph]:
        """Begins to load a graph, where that has not begun yet; with a batch's first one, those after it that are kept, too."""
        following = [one for one in self.following if self.cache.keeps(one)] if graph == FIRST else []
        with self.lock:
            if graph not in self.loading or not self.loading[graph].done():
                ThreadedProcess.enter()
            for one in (graph, *following):
                if one not in self.loading:
                    self.loading[one] = self.loader.submit(self.load_now, one)
            return self.loading[graph]

    def compile_all(self) -> None:
        """What a batch runs and the cache folder does not keep yet."""
        for graph in (FIRST, *self.following):
            if not self.cache.keeps(graph):
                self.load(graph).result()

    @kept_signal_stack()
    def load_now(self, graph: str) -> CompiledGraph:
        try:
            compiled = self.cache.get(graph, lambda path: self.compile(graph, path))
            if graph in FIRST_RUN:
                run_on_zeros(compiled, FIRST_RUN[graph])
            return compiled
        except BaseException as error:
            with self.lock:
                self.loading.pop(graph, None)  # to be tried again
            if isinstance(error, RuntimeError):
                path = self.manifest.path(f"{graph}.onnx")
                raise BackendError(f"{path}: OpenVINO {ov.__version__} cannot load it: {reason(error)}") from error
            raise

    def compile(self, graph: str, path: Path) -> ov.CompiledModel:
        model = self.core.read_model(path)
        return self.core.compile_model(model, "CPU", {**self.options(graph), **rewrite(model, **self.form(graph))})

    def give_back(self) -> None:
        """The pages of all files that were read."""
        with self.lock:
            loaded = [one for one in self.loading.values() if one.done() and not one.cancelled() and not one.exception()]
        for one in loaded:
            one.result().give_back()

    def close(self) -> None:
        self.loader.shutdown(wait=False, cancel_futures=True)
        self.loading.clear()


class OpenVinoBackend(LaneBackend["OpenVinoLane"]):
    """Lanes that run compiled graphs."""

    name = "openvino"

    def __init__(self, manifest: Manifest, device: str, threads: int | None = None, slots: int = 1) -> None:
        self.device = device
        self.graphs = graphs = CompiledGraphs(manifest, threads)
        self.lanes = Lanes(lambda: OpenVinoLane(graphs), slots, graphs.close)
        self.trimmed = 0.0  # when, by the monotonic clock

    def try_graphs(self) -> None:
        """Of a graph that it has not compiled yet, OpenVINO may refuse an operator on some CPU; and ONNX Runtime may be the faster one."""
        if self.graphs.slower and find_spec("onnxruntime"):
            raise BackendError(self.graphs.slower)
        self.graphs.compile_all()

    @contextlib.contextmanager
    def lease(self) -> Iterator[OpenVinoLane]:
        with super().lease() as lane:
            yield lane
        self.give_back()

    def give_back(self) -> None:
        """Gives the system what batches of other sizes have left: pages of graphs' files that their kernels have packed, and what lies
        between what is in use, which glibc keeps, and more of it with every new size. At most once in a while, as it takes milliseconds.
        """
        now = time.monotonic()
        if now - self.trimmed > TRIM_SECONDS:
            self.trimmed = now
            self.graphs.give_back()
            if MALLOC_TRIM:
                MALLOC_TRIM(0)


class OpenVinoLane(NumpyLane):
    """Infer requests of one batch: made once, and given tensors that lie where they are read and written."""

    def __init__(self, graphs: CompiledGraphs) -> None:
        if graphs.slower:  # now that it is used all the same
            warnings.warn(graphs.slower, RuntimeWarning, stacklevel=2)
        self.graphs = graphs
        self.requests: dict[str, tuple[Any, CompiledGraph]] = {}

    def request(self, graph: str) -> tuple[Any, CompiledGraph]:
        if graph not in self.requests:
            compiled = self.graphs.load(graph).result()
            with kept_signal_stack():
                self.requests[graph] = compiled.model.create_infer_request(), compiled
        return self.requests[graph]

    def close(self) -> None:
        self.requests.clear()

    def modulation_shapes(self) -> dict[str, tuple[int, ...]]:
        _, compiled = self.request("condition")
        return {output.any_name: tuple(dim.get_length() for dim in list(output.partial_shape)[1:]) for output in compiled.model.outputs}

    def run_once(self, graph: str, inputs: Mapping[str, Array]) -> list[Array]:
        request, compiled = self.request(graph)
        shapes = output_shapes(self.graphs.manifest, graph, inputs, self.modulation_shapes)
        try:
            outputs = {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
            # OpenVINO reads and writes where they lie, and keeps none of them alive: a copy that was made here must outlive the run.
            arrays = {name: np.require(array, requirements=("C", "W")) for name, array in {**inputs, **outputs}.items()}
            for name, array in arrays.items():
                request.set_tensor(name, tensor(array))
            with kept_signal_stack():
                request.infer()
            compiled.ran()
        except (RuntimeError, MemoryError) as error:
            raise failure(graph, "OpenVINO", error, reason(error)) from error
        return list(outputs.values())


def run_on_zeros(compiled: CompiledGraph, leading: Mapping[str, tuple[int, ...]]) -> None:
    """Runs a graph once. leading: sizes of its inputs' first axes, which the graph leaves open."""
    arrays = {}
    for port in compiled.model.inputs:
        sizes = leading[port.any_name]
        inner = [dim.get_length() for dim in list(port.partial_shape)[len(sizes) :]]
        arrays[port.any_name] = np.zeros((*sizes, *inner), port.element_type.to_dtype())
    compiled.model.create_infer_request().infer(arrays)
    compiled.ran()


def tensor(array: Array) -> Any:
    """OpenVINO's view of a contiguous array that can be written, without a copy; of nothing there is nothing to view."""
    if array.dtype == np.int64:
        array = array.view(np.int64)  # OpenVINO does not know `long long`, though it is int64 too
    return ov.Tensor(array, shared_memory=True) if array.size else ov.Tensor(array.dtype, array.shape)
