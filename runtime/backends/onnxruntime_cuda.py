"""ONNX Runtime on a GPU, by its CUDA or its TensorRT execution provider, bound to tensors that stay there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable, Mapping

import numpy as np
import onnxruntime as ort

from ...errors import BackendError
from ..manifest import Manifest
from . import Array
from .cache_folder import cache_folder
from .cuda import CudaDevice, device_index
from .device import Device, DeviceMemoryError, DeviceTensor
from .device_lane import DeviceLane
from .lanes import LaneBackend, Lanes
from .sessions import Providers, Sessions, first_line

PACKAGES = ("onnxruntime", "onnxruntime-gpu")
MEND = 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "enat[cuda]"'
TENSORRT_MAJOR = 10  # whose libnvinfer.so ONNX Runtime's TensorRT provider is linked with


class OnnxRuntimeCudaBackend(LaneBackend["OrtLane"]):
    """Sessions on the CUDA execution provider. ONNX Runtime keeps streams of its own and waits at the end of each run."""

    name = "onnxruntime"
    provider = "CUDAExecutionProvider"

    def __init__(self, manifest: Manifest, device: str, threads: int | None = None, slots: int = 1) -> None:
        check_packages(self.provider)
        ort.preload_dlls()  # CUDA and cuDNN from their wheels, where they are installed so
        index = device_index(device)
        self.device = f"cuda:{index}"
        options = ort.SessionOptions()
        options.log_severity_level = 4
        providers = self.providers
        sessions = Sessions(manifest.reading, options, lambda graph: providers(graph, index, manifest))
        self.lanes = Lanes(lambda: OrtLane(manifest, CudaDevice(index), sessions, "cuda"), slots, sessions.close)

    @classmethod
    def providers(cls, graph: str, index: int, manifest: Manifest) -> Providers:
        # TF32 keeps 10 bits of a float32's 23: a float32 engine would not give what it gives on a CPU. Memory is taken as it is needed: by
        # default ONNX Runtime takes twice what it has, of a GPU that others may use too.
        return [("CUDAExecutionProvider", {"device_id": index, "use_tf32": 0, "arena_extend_strategy": "kSameAsRequested"})]


class OnnxRuntimeTensorRTBackend(OnnxRuntimeCudaBackend):
    """Sessions on the TensorRT execution provider, which builds engines of its own when it meets new shapes, and keeps them in
    the cache folder. Types are not strict to it: with float16 allowed it may choose it for what a graph has in float32, so that the
    sampler, whose numbers are float32 in every engine, is left to the CUDA provider.
    """

    name = "onnxruntime-tensorrt"
    provider = "TensorrtExecutionProvider"

    def __init__(self, manifest: Manifest, device: str, threads: int | None = None, slots: int = 1) -> None:
        load_tensorrt()
        super().__init__(manifest, device, threads, slots)

    @classmethod
    def providers(cls, graph: str, index: int, manifest: Manifest) -> Providers:
        others = super().providers(graph, index, manifest)
        if graph == "sampler":
            return others
        folder, half = cache_folder(manifest, "onnxruntime-tensorrt"), manifest.float_type == "float16"
        options = {
            "device_id": index,
            "trt_fp16_enable": half,
            "trt_layer_norm_fp32_fallback": half,
            "trt_engine_cache_enable": folder is not None,
            "trt_engine_cache_path": str(folder or ""),
            "trt_timing_cache_enable": folder is not None,
            "trt_timing_cache_path": str(folder or ""),
        }
        return [(cls.provider, options), *others]


def check_packages(provider: str) -> None:
    """Raises BackendError where the installed onnxruntime cannot use a GPU, with the commands that mend it."""
    installed = []
    for package in PACKAGES:
        try:
            installed.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if len(installed) == len(PACKAGES):
        raise BackendError(f"{' and '.join(installed)} are both installed and overwrite each other; mend it with: {MEND}")
    if provider not in ort.get_available_providers():
        raise BackendError(f"ONNX Runtime {ort.__version__} ({', '.join(installed)}) has no {provider}; install it with: {MEND}")


def load_tensorrt() -> None:
    """Loads TensorRT's libraries for ONNX Runtime. Raises BackendError where they are missing or of another version."""
    if importlib.util.find_spec("tensorrt") is None:
        raise BackendError('TensorRT is not installed; install it with: pip install "enat[gpu]"')
    import tensorrt

    if int(tensorrt.__version__.split(".")[0]) != TENSORRT_MAJOR:
        raise BackendError(
            f"ONNX Runtime's TensorRT provider needs TensorRT {TENSORRT_MAJOR}, found {tensorrt.__version__}; use --backend tensorrt, "
            f"or: pip install 'tensorrt-cu13>=10.13,<11'"
        )


class OrtLane(DeviceLane):
    """Binds the lane's memory to ONNX Runtime's sessions. Its runs cannot be recorded, as they end with a wait."""

    records = False

    def __init__(self, manifest: Manifest, device: Device, sessions: Sessions, kind: str) -> None:
        super().__init__(manifest, device)
        self.sessions = sessions
        self.kind = kind  # of device, in ONNX Runtime's words
        self.index = int(device.name.split(":")[1]) if ":" in device.name else 0

    def scratch_of_image(self, graphs: Iterable[str]) -> None:
        """ONNX Runtime allocates as it goes."""

    def modulation_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {output.name: tuple(output.shape[1:]) for output in self.sessions.get("condition").get_outputs()}

    def execute(self, graph: str, inputs: Mapping[str, DeviceTensor | Array], outputs: Mapping[str, DeviceTensor]) -> None:
        session = self.sessions.get(graph)
        binding = session.io_binding()
        for name, tensor in inputs.items():
            if isinstance(tensor, np.ndarray):
                binding.bind_cpu_input(name, tensor)
            else:
                binding.bind_input(name, self.kind, self.index, tensor.dtype.type, list(tensor.shape), tensor.address)
        for name, tensor in outputs.items():
            binding.bind_output(name, self.kind, self.index, tensor.dtype.type, list(tensor.shape), tensor.address)
        self.device.synchronize()  # ONNX Runtime's streams do not wait for this lane's
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
            text = first_line(error)
            short = any(words in text for words in ("allocate memory", "out of memory", "ALLOC_FAILED"))  # of cuBLAS and cuDNN, too
            raise (DeviceMemoryError if short else BackendError)(f"{graph}.onnx: ONNX Runtime failed: {text}") from error
