"""Backends run an engine's graphs. A new one is one file here and one line in BACKENDS.

The loop treats a backend's tensors as opaque: it never looks into one, so they may stay on a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError, InputError
from ..manifest import Manifest

Tensor = Any  # a backend's own handle

# name → module and class; imported when first asked for
BACKENDS = {"onnxruntime": ("onnxruntime_cpu", "OnnxRuntimeBackend")}


class Backend(Protocol):
    """What the loop needs of a backend. `run` may return before the work is done; only `download` waits for it.

    Methods may be called from several threads at once.
    """

    name: str
    device: str

    def upload(self, array: NDArray[Any]) -> Tensor:
        """A tensor with the array's values. 0-dimensional arrays are the graphs' scalars, and may stay on the host."""

    def download(self, tensor: Tensor) -> NDArray[Any]:
        """The tensor's values; waits for what computes them."""

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Runs a graph ("encoder", …) → its outputs in the contract's order."""

    def first_rows(self, tensor: Tensor, rows: int) -> Tensor:
        """The first `rows` entries along axis 0."""

    def concatenate(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors one after the other along axis 1."""

    def close(self) -> None:
        """Gives back what the backend holds."""


def open_backend(name: str, manifest: Manifest, device: str = "cpu", threads: int | None = None) -> Backend:
    """Loads an engine's graphs into a backend. `name` is one of BACKENDS or "auto"; `threads` on the CPU, all cores by default.

    Raises InputError for an unknown name, BackendError where the backend is not installed or cannot load the graphs.
    """
    if name == "auto":
        name = "onnxruntime"
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}; expected auto or one of {', '.join(BACKENDS)}")
    if threads is not None and threads < 1:
        raise InputError(f"expected 1 or more threads, got {threads}")
    module, cls = BACKENDS[name]
    try:
        backend: Backend = getattr(import_module(f".{module}", __package__), cls)(manifest, device, threads)
    except ImportError as error:
        raise BackendError(f"the backend {name} is not installed ({error}); install it with: pip install 'enat[cpu]'") from error
    return backend


FLOAT_TYPES: dict[str, type[np.floating[Any]]] = {"float32": np.float32, "float16": np.float16}
