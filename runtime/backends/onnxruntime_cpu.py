"""ONNX Runtime on the CPU. A tensor is a NumPy array."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence

import onnxruntime as ort

from ...errors import first_line
from ..cores import machine_cores
from ..manifest import Manifest
from . import Array
from .contract import OUTPUTS
from .int8_kernels import OVERFLOW, PROBE, SAFE_WEIGHT_BITS, saturate
from .lanes import LaneBackend, Lanes
from .numpy_lane import NumpyLane, failure
from .sessions import CPU, Sessions

FEATURES = 2**19  # 2 MB of float32 a core, of one of the tensors that a picture's tokens have


@functools.cache
def int8_saturates() -> bool:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(PROBE, options, providers=["CPUExecutionProvider"])
    return saturate(lambda x: session.run(None, {"x": x})[0])


def session_options(manifest: Manifest, threads: int | None = None, slots: int = 1) -> ort.SessionOptions:
    """What an engine's graphs need of ONNX Runtime on this CPU; warns where that is slow."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = session_threads(threads, slots)
    # Every session has threads of its own. Those of the last graph must not spin while the next one runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4
    if manifest.precision == "int8" and manifest.weight_bits > SAFE_WEIGHT_BITS and int8_saturates():
        options.add_session_config_entry(exact_products(manifest), "1")
        remedy = f"an engine made with --weight-bits {SAFE_WEIGHT_BITS} runs on the fast ones"
        warnings.warn(f"{manifest.folder}: {OVERFLOW}, so slower ones are used; {remedy}", RuntimeWarning, stacklevel=3)
    return options


def exact_products(manifest: Manifest) -> str:
    """The setting of a session with which no sum of 8-bit products is lost: kernels for unsigned weights; or products of floats, in four
    times the memory, where the rest is float16: ONNX Runtime (1.32) refuses what it makes of such weights for those kernels.
    """
    return f"session.{'disable_quant_qdq' if manifest.float_type == 'float16' else 'x64quantprecision'}"


def threads_used(threads: int | None) -> int:
    return threads or machine_cores()


def session_threads(threads: int | None, slots: int) -> int:
    """Of a session, which counts one that runs it among its threads: all that run it and those of its own are to be `threads`, by default
    as many as the machine has cores. 0: as ONNX Runtime chooses for one.
    """
    return threads or 0 if slots == 1 else max(1, threads_used(threads) - slots + 1)


def pictures_at_once(manifest: Manifest, threads: float) -> int:
    """Of how many pictures the network's features fill the caches of so many cores: with more it draws no faster, but takes more memory."""
    return max(1, int(FEATURES * threads / (manifest.model.length * manifest.model.dim)))


class OnnxRuntimeBackend(LaneBackend["OnnxRuntimeLane"]):
    """One session a graph, made when the graph is first run, and shared by all lanes."""

    name = "onnxruntime"

    def __init__(self, manifest: Manifest, device: str, threads: int | None = None, slots: int = 1) -> None:
        self.device = device
        options = session_options(manifest, threads, slots)
        sessions = Sessions(manifest.reading, options, lambda graph: CPU)
        at_once = pictures_at_once(manifest, threads_used(threads) / slots)
        self.lanes = Lanes(lambda: OnnxRuntimeLane(sessions, at_once), slots, sessions.close)
        self.sessions = sessions


class OnnxRuntimeLane(NumpyLane):
    """Nothing of it belongs to one batch. pictures: the network runs on no more of them at once, whatever the batch; by default on all."""

    def __init__(self, sessions: Sessions, pictures: int | None = None) -> None:
        self.sessions = sessions
        if pictures:
            self.pictures_at_once = {**self.pictures_at_once, "encoder": pictures, "decoder": pictures}

    def outputs(self, graph: str) -> list[str]:
        """What is asked of a graph, by name: they may stand in any order."""
        return list(OUTPUTS[graph])

    def run_once(self, graph: str, inputs: Mapping[str, Array]) -> Sequence[Array]:
        session = self.sessions.get(graph)
        try:
            return session.run(self.outputs(graph), dict(inputs))
        except Exception as error:
            raise failure(graph, "ONNX Runtime", error, first_line(error)) from error
