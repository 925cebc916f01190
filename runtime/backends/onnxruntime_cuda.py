"""ONNX Runtime on a GPU, by its CUDA or its TensorRT execution provider, bound to tensors that stay there."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ...errors import BackendError, first_line
from ..builds import Profile, Shape
from ..manifest import Manifest
from ..profiles import general_profile
from . import MOST_IMAGES, Array
from .cache_folder import cache_folder
from .cuda import CudaDevice, device_facts, device_index
from .device import Device, DeviceMemoryError, DeviceTensor
from .device_lane import DeviceLane
from .lanes import DeviceBackend, Lanes
from .sessions import Providers, Sessions

PACKAGES = ("onnxruntime", "onnxruntime-gpu")
MEND = 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "enat[cuda]"'
SHORT_OF_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")  # in the words of cuBLAS and cuDNN, too


class OnnxRuntimeCudaBackend(DeviceBackend["OrtLane"]):
    """Sessions on the CUDA execution provider. ONNX Runtime keeps streams of its own and waits at the end of each run."""

    name = "onnxruntime"
    provider = "CUDAExecutionProvider"

    def __init__(self, manifest: Manifest, device: str, threads: int | None = None, slots: int = 1) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # where it says what it does not find
            ort.preload_dlls()  # CUDA and cuDNN from their wheels, where they are installed so; some providers are there only then
        check_packages(self.provider)
        index = device_index(device)
        self.device = f"cuda:{index}"
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1  # nothing of weight runs on the CPU
        providers, most = self.providers, MOST_IMAGES.get(self.name)
        sessions = Sessions(manifest.reading, options, lambda graph: providers(graph, index, manifest, lambda: modulation_shapes(sessions)))
        super().__init__(Lanes(lambda: OrtLane(manifest, CudaDevice(index), sessions, "cuda", most), slots, sessions.close))

    @classmethod
    def providers(cls, graph: str, index: int, manifest: Manifest, modulation: Callable[[], Mapping[str, Shape]]) -> Providers:
        """Of a graph, with their options. modulation: gives the shapes of the condition graph's outputs beyond the first axis."""
        options = {
            **on_device(index),
            # It keeps 10 bits of a float32's 23: a float32 engine would not give what it gives on a CPU.
            "use_tf32": 0,
            # By default ONNX Runtime takes twice what it has, of a GPU that others may use too.
            "arena_extend_strategy": "kSameAsRequested",
            # By default it times all of them for every new shape, as of a batch of another size.
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        return [("CUDAExecutionProvider", options)]


class OnnxRuntimeTensorRTBackend(OnnxRuntimeCudaBackend):
    """Sessions on the TensorRT execution provider, which builds an engine of each graph when it first runs, for whatever it may be asked,
    and keeps it in the cache folder. Types are not strict to it: with float16 allowed it may choose it for what a graph has in float32,
    so that the sampler, whose numbers are float32 in every engine, is left to the CUDA provider.
    """

    name = "onnxruntime-tensorrt"
    provider = "TensorrtExecutionProvider"

    def __init__(self, manifest: Manifest, device: str, threads: int | None = None, slots: int = 1) -> None:
        load_tensorrt()
        super().__init__(manifest, device, threads, slots)

    @classmethod
    def providers(cls, graph: str, index: int, manifest: Manifest, modulation: Callable[[], Mapping[str, Shape]]) -> Providers:
        others = super().providers(graph, index, manifest, modulation)
        if graph == "sampler":
            return others
        most, half = MOST_IMAGES[cls.name], manifest.float_type == "float16"
        folder = cache_folder(manifest, f"{cls.name}-{most}-{cls.platform(index)}")
        kept: dict[str, Any] = {}
        if folder is not None:  # to ONNX Runtime no path is a wrong one, even where it would not be used
            for what in ("engine", "timing"):
                kept |= {f"trt_{what}_cache_enable": True, f"trt_{what}_cache_path": str(folder)}
        profile = general_profile(manifest, graph, (1, 1, most), modulation() if graph in ("encoder", "decoder") else None)
        options = {
            **{f"trt_profile_{name}_shapes": joined(profile, index) for index, name in enumerate(("min", "opt", "max"))},
            **on_device(index),
            "trt_fp16_enable": half,
            "trt_layer_norm_fp32_fallback": half,
            **kept,
        }
        return [(cls.provider, options), *others]

    @staticmethod
    def platform(index: int) -> str:
        """TensorRT and GPU, as a part of a folder's name. ONNX Runtime takes engines of others for its own, and fails to load them."""
        import tensorrt

        name, _ = device_facts(index)
        return re.sub(r"[^\w.]+", "-", f"{tensorrt.__version__}-{name}")


def on_device(index: int) -> dict[str, int]:
    """Of a provider's options. ONNX Runtime runs on device 0 by itself, and has a line about plugins on stderr where it is asked to."""
    return {"device_id": index} if index else {}


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

    linked, found = linked_tensorrt(Path(ort.__file__).parent), tensorrt.__version__
    if linked and linked != found.split(".")[0]:
        raise BackendError(
            f"ONNX Runtime {ort.__version__}'s TensorRT provider needs TensorRT {linked}, found {found}; use --backend tensorrt, "
            f"or: pip install 'tensorrt-cu13>={linked},<{int(linked) + 1}'"
        )


def linked_tensorrt(package: Path) -> str | None:
    """Major version of the TensorRT that ONNX Runtime's provider is linked with; None where its library does not tell."""
    for provider in package.glob("capi/*onnxruntime_providers_tensorrt.*"):
        if found := re.search(rb"nvinfer(?:\.so\.|_)(\d+)", provider.read_bytes()):
            return found[1].decode()
    return None


def joined(profile: Profile, index: int) -> str:
    """Least (0), best (1) or largest (2) shapes of a profile, as the TensorRT provider reads them."""
    return ",".join(f"{name}:{'x'.join(map(str, shapes[index]))}" for name, shapes in profile.items())


def modulation_shapes(sessions: Sessions) -> dict[str, Shape]:
    return {output.name: tuple(output.shape[1:]) for output in sessions.get("condition").get_outputs()}


class OrtLane(DeviceLane):
    """Binds the lane's memory to ONNX Runtime's sessions. Its runs cannot be recorded, as they end with a wait."""

    records = False

    def __init__(self, manifest: Manifest, device: Device, sessions: Sessions, kind: str, most_images: int | None = None) -> None:
        super().__init__(manifest, device, most_images, "onnxruntime-tensorrt")
        self.sessions = sessions
        self.kind = kind  # of device, in ONNX Runtime's words
        self.index = int(device.name.split(":")[1]) if ":" in device.name else 0

    def scratch_of_image(self, graphs: Iterable[str]) -> None:
        """ONNX Runtime allocates as it goes."""

    def modulation_shapes(self) -> Mapping[str, Shape]:
        return modulation_shapes(self.sessions)

    def execute(self, graph: str, inputs: Mapping[str, DeviceTensor | Array], outputs: Mapping[str, DeviceTensor]) -> None:
        session = self.sessions.get(graph)
        self.device.synchronize()  # ONNX Runtime's streams do not wait for this lane's, and it may copy what is bound at once
        binding = session.io_binding()
        for name, tensor in inputs.items():
            if isinstance(tensor, np.ndarray):
                binding.bind_cpu_input(name, tensor)
            else:
                binding.bind_input(name, self.kind, self.index, tensor.dtype.type, list(tensor.shape), tensor.address)
        for name, tensor in outputs.items():
            binding.bind_output(name, self.kind, self.index, tensor.dtype.type, list(tensor.shape), tensor.address)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
            text = first_line(error)
            short = any(words in text for words in SHORT_OF_MEMORY)
            raise (DeviceMemoryError if short else BackendError)(f"{graph}.onnx: ONNX Runtime failed: {text}") from error
