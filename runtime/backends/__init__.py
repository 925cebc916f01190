"""Backends run an engine's graphs. A new one is one file here and one line in BACKENDS.

The loop treats a backend's tensors as opaque: it never looks into one, so they may stay on a device.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError, EngineError, InputError
from ..classes import whole
from ..cores import allowed_threads
from ..interrupts import held_back
from ..manifest import Manifest

Array = NDArray[Any]
Tensor = Any  # a backend's own handle
Program = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]

# name → kind of device → module and class, imported when first asked for
BACKENDS = {
    "onnxruntime": {"cpu": ("onnxruntime_cpu", "OnnxRuntimeBackend"), "cuda": ("onnxruntime_cuda", "OnnxRuntimeCudaBackend")},
    "openvino": {"cpu": ("openvino_cpu", "OpenVinoBackend")},
    "onnxruntime-tensorrt": {"cuda": ("onnxruntime_cuda", "OnnxRuntimeTensorRTBackend")},
    "tensorrt": {"cuda": ("tensorrt", "TensorRTBackend")},
}
AUTO = {"cpu": ("openvino", "onnxruntime"), "cuda": ("tensorrt", "onnxruntime")}  # in the order of trying
# On a CPU; in narrower networks OpenVINO's work between the products outweighs what it gains in them.
WIDE, WIDE_IN_8_BITS = 384, 256
MOST_SLOTS = 1024
MOST_IMAGES = {"onnxruntime-tensorrt": 16}  # at once: what its engines are built for
# What to install for a kind of device, or for one backend.
EXTRAS = {"cpu": "cpu", "cuda": "cuda", "openvino": "openvino", "tensorrt": "gpu", "onnxruntime-tensorrt": "gpu"}


class Lane(Protocol):
    """Where the tensors of one batch live and its graphs run, one after the other. One thread uses it at a time.

    `run` may return before the work is done; only `download` and `compute` wait for it.
    """

    records: bool  # whether `compute` makes a record of what it launches
    dry: bool  # while it only counts what a program takes: its tensors have no values, and nobody may look at them

    def upload(self, array: Array) -> Tensor:
        """A tensor with the array's values."""

    def download(self, tensor: Tensor) -> Array:
        """The tensor's values; waits for what computes them."""

    def run(self, graph: str, inputs: Mapping[str, Tensor | Array]) -> Sequence[Tensor]:
        """Runs a graph ("encoder", …) → its outputs in the contract's order. `keep`, which decides shapes, stays a NumPy array."""

    def first_rows(self, tensor: Tensor, rows: int) -> Tensor:
        """The first `rows` entries along axis 0."""

    def concatenate(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors one after the other along axis 1."""

    def compute(self, key: Hashable | None, arrays: Mapping[str, Array], program: Program) -> list[Array]:
        """Uploads the arrays, runs the program on the tensors, and downloads what it gives.

        Programs with the same key launch the same work on arrays of the same shapes, whatever the values: a lane may record it the
        first time and launch the record from then on, without calling the program. None: it is never recorded.
        """


class Backend(Protocol):
    """An engine's graphs, loaded. Its methods may be called from several threads at once."""

    name: str
    device: str

    def lease(self) -> AbstractContextManager[Lane]:
        """A lane for the time of a `with` block; waits in turn while all are taken. Raises BackendError once the backend is closed."""

    def close(self) -> None:
        """Gives back what the backend holds: what is in use, when its batch is done."""


class Candidate(Backend, Protocol):
    """One of BACKENDS."""

    def try_graphs(self) -> None:
        """Makes sure that the engine's graphs can be run, where that is not sure yet. Raises BackendError, EngineError."""


def open_backend(name: str, manifest: Manifest, device: str = "cpu", threads: int | None = None, slots: int = 1) -> Backend:
    """Loads an engine's graphs into a backend.

    name: one of BACKENDS, or "auto" for the first of AUTO that is installed and works. device: cpu, cuda or cuda:N. threads: on the CPU,
    one for each core that the process may use by default. slots: batches in flight at once. Warns where auto passes over what is there.
    Raises InputError for words and numbers that it does not know, BackendError where the backend is not installed or cannot load the
    graphs, EngineError where auto finds files altered.
    """
    device = str(device)  # PyTorch's are no strings
    kind, _ = parse_device(device)
    if name != "auto" and name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}; expected auto or one of {', '.join(BACKENDS)}")
    most = os.cpu_count() or 1
    if threads is not None:
        threads = whole(threads, "a whole number of threads")
        if not 1 <= threads <= most:
            raise InputError(f"expected 1 to {most} threads, as this machine's CPU has, got {threads}")
    elif kind == "cpu":
        threads = allowed_threads()
    slots = whole(slots, "a whole number of slots")
    if not 1 <= slots <= MOST_SLOTS:
        raise InputError(f"expected 1 to {MOST_SLOTS} slots, got {slots}")
    if name != "auto":
        return load_backend(name, kind, manifest, device, threads, slots)
    reasons: list[str] = []
    notable: list[str] = []  # of what is there, and was to be used
    for candidate in in_order(kind, manifest):
        try:
            backend = load_backend(candidate, kind, manifest, device, threads, slots)
            with contextlib.ExitStack() as stack:
                stack.callback(backend.close)
                backend.try_graphs()
                stack.pop_all()
        except (BackendError, EngineError) as error:
            if isinstance(error, EngineError) and candidate != "tensorrt":  # of whose builds it is; else the engine is at fault
                raise
            reasons.append(str(error))
            if not isinstance(error.__cause__, ModuleNotFoundError) and (candidate != "tensorrt" or manifest.builds):
                notable.append(f"{candidate} is passed over: {error}")
            continue
        for line in notable:
            warnings.warn(line, RuntimeWarning, stacklevel=3)
        return backend
    raise BackendError("; ".join(dict.fromkeys(reasons)))


def parse_device(device: str) -> tuple[str, int]:
    """cpu, cuda or cuda:N → its kind, and which of that kind. Raises InputError."""
    match = re.fullmatch(r"(cpu|cuda)(?:(?<=cuda):(\d{1,4}))?", device, re.ASCII)
    if not match:
        raise InputError(f"unknown device {device!r}; expected cpu, cuda or cuda:N")
    return match[1], int(match[2] or 0)


def in_order(kind: str, manifest: Manifest) -> Sequence[str]:
    """The backends to try for a kind of device and an engine. enat-bench measures which is faster on a machine."""
    wide = WIDE_IN_8_BITS if manifest.precision == "int8" else WIDE
    return AUTO[kind][::-1] if kind == "cpu" and manifest.model.dim < wide else AUTO[kind]


def check_precision(name: str, manifest: Manifest) -> None:
    """Raises InputError where a backend runs no engines of this precision."""
    if name == "onnxruntime-tensorrt" and manifest.precision == "int8":
        raise InputError(
            f"{manifest.folder}: {name} runs no int8 engines, whose 8-bit values are unsigned; use fp16 or fp32 ones, or --backend tensorrt"
        )


def load_backend(name: str, kind: str, manifest: Manifest, device: str, threads: int | None, slots: int) -> Candidate:
    if kind not in BACKENDS[name]:
        raise InputError(f"the backend {name} runs on {' and '.join(BACKENDS[name])}, got the device {device!r}")
    check_precision(name, manifest)
    module, cls = BACKENDS[name][kind]
    try:
        with held_back():
            found = getattr(import_module(f".{module}", __package__), cls)
        backend: Candidate = found(manifest, device, threads, slots)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(name, EXTRAS[kind])
        raise BackendError(f'the backend {name} is not installed ({error}); install it with: pip install "enat[{extra}]"') from error
    except ImportError as error:
        raise BackendError(f"the backend {name} is installed, and cannot be loaded: {error}") from error
    return backend


FLOAT_TYPES: dict[str, type[np.floating[Any]]] = {"float32": np.float32, "float16": np.float16}
