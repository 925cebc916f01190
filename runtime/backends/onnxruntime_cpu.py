"""ONNX Runtime on the CPU. A tensor is a NumPy array."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ...errors import BackendError, InputError
from ..manifest import Manifest

Array = NDArray[Any]

SAFE_WEIGHT_BITS = 7
PROBE = Path(__file__).parent / "int8_probe.onnx"


@functools.cache
def int8_saturates() -> bool:
    """Whether this machine's kernels for unsigned times signed 8-bit numbers lose sums beyond 16 bits: tried, not looked up."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(PROBE, options, providers=["CPUExecutionProvider"])
    (x,) = session.get_inputs()
    (y,) = session.run(None, {x.name: np.full(x.shape, 127, np.float32)})
    return bool((y != x.shape[1] * 127**2).any())


class OnnxRuntimeBackend:
    """One session a graph, made when the graph is first run."""

    name = "onnxruntime"

    def __init__(self, manifest: Manifest, device: str, threads: int | None) -> None:
        if device != "cpu":
            raise InputError(f"the backend {self.name} runs on the device cpu, got {device!r}")
        self.device = device
        self.manifest = manifest
        self.options = ort.SessionOptions()
        self.options.intra_op_num_threads = threads or 0
        # Every session has threads of its own. Those of the last graph must not spin while the next one runs.
        self.options.add_session_config_entry("session.force_spinning_stop", "1")
        self.options.log_severity_level = 3
        if manifest.precision == "int8" and manifest.weight_bits > SAFE_WEIGHT_BITS and int8_saturates():
            # Slower kernels, but right ones.
            self.options.add_session_config_entry("session.x64quantprecision", "1")
            warnings.warn(
                f"{manifest.folder}: this CPU's fast int8 kernels overflow (it has no VNNI), so slower ones are used; "
                f"an engine made with --weight-bits {SAFE_WEIGHT_BITS} runs on the fast ones",
                RuntimeWarning,
                stacklevel=2,
            )
        self.sessions: dict[str, ort.InferenceSession] = {}
        self.lock = threading.Lock()

    def session(self, graph: str) -> ort.InferenceSession:
        with self.lock:
            if graph not in self.sessions:
                path = self.path(graph)
                try:
                    self.sessions[graph] = ort.InferenceSession(path, self.options, providers=["CPUExecutionProvider"])
                except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
                    raise BackendError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {first_line(error)}") from error
            return self.sessions[graph]

    def path(self, graph: str) -> Path:
        return self.manifest.path(f"{graph}.onnx")

    def upload(self, array: Array) -> Array:
        return array

    def download(self, tensor: Array) -> Array:
        return tensor

    def run(self, graph: str, inputs: Mapping[str, Array]) -> Sequence[Array]:
        session = self.session(graph)
        try:
            return session.run(None, dict(inputs))
        except Exception as error:
            raise BackendError(f"{graph}.onnx: ONNX Runtime failed: {first_line(error)}") from error

    def first_rows(self, tensor: Array, rows: int) -> Array:
        return tensor[:rows]

    def concatenate(self, tensors: Sequence[Array]) -> Array:
        return np.concatenate(tensors, axis=1)

    def close(self) -> None:
        with self.lock:
            self.sessions.clear()


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
