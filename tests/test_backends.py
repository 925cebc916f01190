"""Which backend runs an engine, and what is said where none can."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from conftest import invoke, modulation, refused
from host_device import HostDevice

from enat import Pipeline, commands
from enat.errors import BackendError, EngineError, InputError
from enat.export.cli import main as export_main
from enat.runtime import backends
from enat.runtime.backends import onnxruntime_cuda, open_backend
from enat.runtime.backends.numpy_lane import failure
from enat.runtime.backends.sessions import CPU, Sessions
from enat.runtime.interrupts import held_back
from enat.runtime.manifest import Manifest, read_manifest

PLATFORM = "10.16.1.11-NVIDIA-H200"


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with TensorRT, as far as names go."""
    monkeypatch.setattr(onnxruntime_cuda.OnnxRuntimeTensorRTBackend, "platform", lambda index: PLATFORM)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_paths_that_are_no_text(engines: Callable[[str], Path], tmp_path: Path) -> None:
    engine = shutil.copytree(engines("tiny"), tmp_path / os.fsdecode(b"\xff"))
    with pytest.raises(BackendError, match=r"ONNX Runtime .* cannot load it: it takes no paths that are no UTF-8"):
        Pipeline.load(engine, "onnxruntime").generate_tokens([1])


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (RuntimeError("bfc_arena.cc:360 void* onnxruntime::BFCArena::AllocateRawInternal Failed to allocate memory for 1 B"), True),
        (RuntimeError("[CPU] Transpose node with name 'T' Check 'ptr' failed at src/plugins/intel_cpu/src/cpu_memory.cpp:257:"), True),
        (RuntimeError("std::bad_alloc"), True),
        (MemoryError("Unable to allocate 1 GiB"), True),
        (RuntimeError("an invalid shape"), False),
    ],
)
def test_memory_that_a_cpu_lacks(error: Exception, short: bool) -> None:
    said = str(failure("encoder", "OpenVINO", error, "the reason"))
    assert said == (
        "encoder.onnx: not enough memory for so many pictures at once; choose a smaller batch size"
        if short
        else "encoder.onnx: OpenVINO failed: the reason"
    )


def test_words_and_numbers_that_are_not_known(engines: Callable[[str], Path]) -> None:
    for options, message in (
        ({"backend": "none"}, "unknown backend 'none'; expected auto or one of onnxruntime, openvino, onnxruntime-tensorrt, tensorrt"),
        ({"device": "tpu"}, "unknown device 'tpu'; expected cpu, cuda or cuda:N"),
        ({"device": "cuda:٣"}, "unknown device 'cuda:٣'"),
        ({"device": "cuda:12345"}, "unknown device 'cuda:12345'"),
        ({"device": "cpu\n"}, r"unknown device 'cpu\n'"),
        ({"backend": "tensorrt"}, "the backend tensorrt runs on cuda, got the device 'cpu'"),
        ({"threads": 0}, f"expected 1 to {os.cpu_count()} threads, as this machine's CPU has, got 0"),
        ({"threads": 10_000}, f"expected 1 to {os.cpu_count()} threads"),
        ({"slots": 0}, "expected 1 to 1024 slots, got 0"),
        ({"slots": 2**70}, "expected 1 to 1024 slots, got 1180591620717411303424"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            Pipeline.load(engines("tiny"), **options)  # type: ignore[arg-type]


def test_a_device_that_is_no_string(engines: Callable[[str], Path]) -> None:
    """As PyTorch's."""

    class Device:
        def __str__(self) -> str:
            return "cpu"

    with Pipeline.load(engines("tiny"), "onnxruntime", Device()) as pipeline:  # type: ignore[arg-type]
        assert pipeline.backend.device == "cpu"


def test_auto_takes_the_first_that_works(engines: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(engines("tiny"))
    tried: list[str] = []

    def load(name: str, *rest: Any) -> Any:
        tried.append(name)
        if name == "tensorrt":
            raise EngineError("no build")
        return types.SimpleNamespace(name=name, try_graphs=lambda: None, close=lambda: None)

    monkeypatch.setattr(backends, "load_backend", load)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_backend("auto", manifest, "cuda:0").name == "onnxruntime"
    with pytest.warns(RuntimeWarning, match="tensorrt is passed over: no build"):  # though there are some
        open_backend("auto", dataclasses.replace(manifest, builds=[{}]), "cuda:0")
    tried.clear()
    open_backend("auto", manifest, "cuda:0")
    assert tried == ["tensorrt", "onnxruntime"]
    assert open_backend("auto", manifest).name == "onnxruntime"
    for precision, dim, taken in (
        ("fp32", 383, "onnxruntime"),
        ("fp32", 384, "openvino"),
        ("int8", 255, "onnxruntime"),
        ("int8", 256, "openvino"),
    ):
        other = dataclasses.replace(manifest, precision=precision, model=dataclasses.replace(manifest.model, dim=dim))
        assert open_backend("auto", other).name == taken
    monkeypatch.setattr(backends, "load_backend", lambda name, *rest: (_ for _ in ()).throw(BackendError(f"{name} fails")))
    with pytest.raises(BackendError, match="tensorrt fails; onnxruntime fails"):
        open_backend("auto", manifest, "cuda:0")
    monkeypatch.setattr(backends, "load_backend", lambda name, *rest: (_ for _ in ()).throw(BackendError("no GPU")))
    with pytest.raises(BackendError, match=r"^no GPU$"):  # once, though it is the reason of each
        open_backend("auto", manifest, "cuda:0")


def test_what_auto_passes_over_is_closed(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    def load(name: str, *rest: Any) -> Any:
        def try_graphs() -> None:
            if name == "tensorrt":
                raise BackendError("a graph")

        return types.SimpleNamespace(name=name, try_graphs=try_graphs, close=lambda: closed.append(name))

    monkeypatch.setattr(backends, "load_backend", load)
    assert open_backend("auto", manifest, "cuda:0").name == "onnxruntime"
    assert closed == ["tensorrt"]


def test_a_provider_that_did_not_start(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime goes on with the CPU's, and says nothing."""
    made = types.SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", lambda *rest, **named: made)
    sessions = Sessions(manifest.reading, ort.SessionOptions(), lambda graph: [("CUDAExecutionProvider", {}), *CPU])
    with pytest.raises(BackendError, match=r"encoder\.onnx: ONNX Runtime .* could not start its CUDAExecutionProvider"):
        sessions.get("encoder")


def test_a_backend_that_is_there_and_broken(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not called missing, and auto says that it is passed over."""
    real = backends.import_module

    def broken(name: str, package: str) -> Any:
        if name == ".onnxruntime_cpu":
            raise ImportError("libcudart.so.13: cannot open shared object file")
        return real(name, package)

    monkeypatch.setattr(backends, "import_module", broken)
    with pytest.raises(BackendError, match=r"the backend onnxruntime is installed, and cannot be loaded: libcudart\.so\.13: cannot open"):
        open_backend("onnxruntime", manifest)
    narrow = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, dim=64))
    with pytest.warns(RuntimeWarning, match=r"onnxruntime is passed over: .* libcudart\.so\.13"):
        open_backend("auto", narrow).close()


@pytest.mark.parametrize("works", [True, False])
def test_ctrl_c_while_a_backend_is_imported(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, ctrl_c: Callable[[], None], works: bool
) -> None:
    """Extension modules may make an ImportError of it: it comes when they are done. So do requests to end."""
    real = backends.import_module

    def interrupted(name: str, package: str) -> Any:
        ctrl_c()
        if works:
            return real(name, package)
        raise ImportError("initialization failed")

    monkeypatch.setattr(backends, "import_module", interrupted)
    for name in ("auto", "onnxruntime"):
        with pytest.raises(KeyboardInterrupt):
            open_backend(name, manifest)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_belongs_to_the_program(manifest: Manifest, ctrl_c: Callable[[], None]) -> None:
    """What it does with it is done once what was held back is over; and nothing is touched in threads, and where it is ignored."""
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    with held_back() as interrupted:
        ctrl_c()
        assert interrupted() and not asked
    assert asked == [signal.SIGINT]
    with held_back():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # set meanwhile by somebody else
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_back() as interrupted:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN and not interrupted()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: open_backend("onnxruntime", manifest).close()).result()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_request_to_end_comes_when_foreign_code_is_done(name: str) -> None:
    """To a program that does something with it; others it ends at once."""
    number = getattr(signal, name)

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(number, end)
    reached = False
    try:
        with pytest.raises(SystemExit, match=str(128 + number)), held_back() as interrupted:
            handler = signal.getsignal(number)
            assert callable(handler) and handler is not end
            handler(number, None)
            assert interrupted()
            reached = True
        assert reached and signal.getsignal(number) is end
        signal.signal(number, signal.SIG_DFL)
        with held_back():
            assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("name", ["run", "export", "verify", "triton", "bench"])
def test_ctrl_c_while_a_command_is_imported(
    monkeypatch: pytest.MonkeyPatch, ctrl_c: Callable[[], None], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    real = commands.import_module

    def interrupted(module: str, package: str) -> Any:
        ctrl_c()
        return real(module, package)

    monkeypatch.setattr(commands, "import_module", interrupted)
    with pytest.raises(SystemExit) as info:
        getattr(commands, name)()
    assert info.value.code == 130 and capsys.readouterr().err == "Error: interrupted\n"


def test_two_onnxruntimes_overwrite_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.31.1")
    with pytest.raises(BackendError) as info:
        onnxruntime_cuda.check_packages("CUDAExecutionProvider")
    assert str(info.value) == (
        "onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are both installed and overwrite each other; "
        'mend it with: pip uninstall -y onnxruntime onnxruntime-gpu && pip install "enat[cuda]"'
    )


def test_an_onnxruntime_that_the_other_one_left_behind(engines: Callable[[str], Path]) -> None:
    code = f"""
import sys, types
sys.modules["onnxruntime"] = types.ModuleType("onnxruntime")
from enat.errors import BackendError
from enat import Pipeline
try:
    Pipeline.load({str(engines("tiny"))!r}, "onnxruntime")
except BackendError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "its files are incomplete, as onnxruntime and onnxruntime-gpu leave each other; uninstall both first" in said


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this ONNX Runtime can use a GPU")
def test_an_onnxruntime_without_a_gpu(engines: Callable[[str], Path]) -> None:
    with pytest.raises(BackendError, match=r"has no CUDAExecutionProvider; install it with: pip uninstall -y"):
        Pipeline.load(engines("tiny"), "onnxruntime", "cuda:0")


@pytest.mark.parametrize("version, linked, accepted", [("10.16.1.11", "10", True), ("11.4.0.106", "10", False), ("11.4.0.106", None, True)])
def test_onnxruntime_needs_its_own_tensorrt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, linked: str | None, accepted: bool
) -> None:
    """The one that its provider's library is linked with."""
    if linked:
        (tmp_path / "capi").mkdir()
        (tmp_path / "capi" / "libonnxruntime_providers_tensorrt.so").write_bytes(b"\x7fELF\0libnvinfer.so.%s\0" % linked.encode())
    monkeypatch.setattr(ort, "__file__", str(tmp_path / "__init__.py"))
    module = types.ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    if accepted:
        onnxruntime_cuda.load_tensorrt()
    else:
        with pytest.raises(BackendError, match=r"needs TensorRT 10, found 11\.4\.0\.106; use --backend tensorrt, or: pip install"):
            onnxruntime_cuda.load_tensorrt()


def test_engines_of_onnxruntime_serve_one_tensorrt_and_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("tensorrt")
    module.__version__ = "10.16.1.11"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(onnxruntime_cuda, "device_facts", lambda index: (f"NVIDIA GeForce RTX 4090/{index}", "8.9"))
    assert onnxruntime_cuda.OnnxRuntimeTensorRTBackend.platform(1) == "10.16.1.11-NVIDIA-GeForce-RTX-4090-1"


@pytest.mark.usefixtures("platform")
def test_float32_stays_float32_on_a_gpu(engine_copy: Path) -> None:
    manifest = read_manifest(engine_copy)
    for cls in (onnxruntime_cuda.OnnxRuntimeCudaBackend, onnxruntime_cuda.OnnxRuntimeTensorRTBackend):
        for graph in ("encoder", "sampler"):
            providers = dict(cls.providers(graph, 3, manifest, lambda: modulation(manifest)))
            assert {"device_id": 3, "use_tf32": 0}.items() <= providers["CUDAExecutionProvider"].items()
            assert all("device_id" not in options for _, options in cls.providers(graph, 0, manifest, lambda: modulation(manifest)))
            assert next(iter(providers)) == (cls.provider if graph == "encoder" else "CUDAExecutionProvider")


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("float_type", ["float32", "float16"])
def test_onnxruntime_builds_engines_of_its_own_where_they_can_be_written(
    engine_copy: Path, float_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    before = sorted(path.name for path in engine_copy.iterdir())
    cls = onnxruntime_cuda.OnnxRuntimeTensorRTBackend
    manifest = dataclasses.replace(read_manifest(engine_copy), float_type=float_type)
    options = dict(cls.providers("decoder", 0, manifest, lambda: modulation(manifest)))[cls.provider]
    for what in ("engine", "timing"):
        assert Path(options[f"trt_{what}_cache_path"]).is_dir() and options[f"trt_{what}_cache_enable"] is True
    assert PLATFORM in options["trt_engine_cache_path"]
    assert options["trt_fp16_enable"] == options["trt_layer_norm_fp32_fallback"] == (float_type == "float16")
    assert sorted(path.name for path in engine_copy.iterdir()) == before  # an engine's files are those that it lists
    monkeypatch.setenv("ENAT_CACHE", "")
    options = dict(cls.providers("decoder", 0, manifest, lambda: modulation(manifest)))[cls.provider]
    assert not any("cache" in name for name in options)  # an empty path would be refused


def test_the_tensorrt_of_onnxruntime_runs_no_8_bit_engines(manifest: Manifest) -> None:
    with pytest.raises(InputError, match="onnxruntime-tensorrt runs no int8 engines, whose 8-bit values are unsigned; use fp16 or"):
        open_backend("onnxruntime-tensorrt", dataclasses.replace(manifest, precision="int8"), "cuda:0")


@pytest.mark.usefixtures("platform")
def test_onnxruntime_builds_for_whatever_a_graph_may_be_asked(manifest: Manifest) -> None:
    """And not for the shapes of the first step, in which nothing is visible yet."""
    cls, model = onnxruntime_cuda.OnnxRuntimeTensorRTBackend, manifest.model
    for graph in ("condition", "encoder", "decoder", "image_decoder", "image_encoder"):
        options = dict(cls.providers(graph, 0, manifest, lambda: modulation(manifest)))[cls.provider]
        ports = ort.InferenceSession(manifest.path(f"{graph}.onnx"), providers=["CPUExecutionProvider"]).get_inputs()
        shapes = []
        for name in ("min", "opt", "max"):
            pairs = [pair.split(":") for pair in options[f"trt_profile_{name}_shapes"].split(",")]
            shapes.append({port: [int(size) for size in sizes.split("x")] for port, sizes in pairs})
        least, best, most = shapes
        for port in ports:
            for sizes in zip(port.shape, least[port.name], best[port.name], most[port.name], strict=True):
                assert sizes[1] == sizes[2] == sizes[3] == sizes[0] or (isinstance(sizes[0], str) and sizes[1] <= sizes[2] <= sizes[3])
                assert sizes[2] > 0
        if graph == "decoder":
            assert (least["features"], most["features"]) == ([1, 0, model.dim], [32, model.length, model.dim])


def test_batches_larger_than_onnxruntime_builds_for(manifest: Manifest) -> None:
    lane = onnxruntime_cuda.OrtLane(manifest, HostDevice(), Sessions(manifest.reading, ort.SessionOptions(), lambda graph: CPU), "cpu", 2)
    for images in (2, 3):
        arrays = {"positions": np.zeros((images, 4), np.int64)}
        with contextlib.nullcontext() if images == 2 else pytest.raises(InputError, match=r"3 images at once are too many .* at most 2"):
            assert len(lane.compute(None, arrays, lambda tensors: [tensors["positions"]])[0]) == 2
    lane.close()


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--max-batch", "4"], ["--max-batch goes with --tensorrt"]),
        ([], ["expected --precision fp16 or int8, or --tensorrt"]),
        (["--tensorrt", "--out", "x"], ["--out: the build goes into"]),
        (["--precision", "fp16", "--out", "x", "--steps", "8"], ["--steps goes with --ckpt or --tensorrt"]),
        (["--precision", "fp16"], ["expected --out with a directory to write"]),
        (["--tensorrt", "--steps", "8,x"], ["--steps: expected a number, or numbers with commas between, got '8,x'"]),
        (["--tensorrt", "--max-batch", "0"], ["expected best batches of 1 to the largest, 0, the smallest first, got 1"]),
        (["--tensorrt", "--best-batch", "8,1"], ["expected best batches of 1 to the largest, 16, the smallest first, got 8,1"]),
        (["--tensorrt", "--version-compatible", "--weights", "stripped"], ["goes with --weights included, not stripped"]),
        (["--tensorrt", "--refit", "nowhere"], ["nowhere: expected an engine directory"]),
        (["--tensorrt", "--device", "cpu"], ["expected a GPU, cuda or cuda:N, got the device 'cpu'"]),
    ],
)
def test_options_of_a_build(engines: Callable[[str], Path], arguments: list[str], parts: list[str]) -> None:
    if "--tensorrt" in arguments:
        from tensorrt_stand_in import import_tensorrt

        import_tensorrt()
    refused(invoke(export_main, "--engine", engines("tiny"), *arguments), *parts)


def test_more_steps_than_one_go_with_a_build(tmp_path: Path) -> None:
    result = invoke(export_main, "--ckpt", "net.pth", "--out", tmp_path / "engine", "--steps", "8,12")
    refused(result, "expected one number of --steps, got 8,12; more of them go with --tensorrt")
