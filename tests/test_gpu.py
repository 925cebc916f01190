"""On an NVIDIA GPU: what cannot be told without one. `make test-gpu`, to which a GPU that cannot be used is a failure."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import list_anew

from enat import Pipeline
from enat.errors import BackendError, EnatError, Stopped
from enat.export.compare import compare
from enat.runtime.manifest import read_manifest
from enat.runtime.pipeline import BUNDLED_ENGINE


def gpu() -> str | None:
    """Why there is no GPU to test on; None where there is one."""
    try:
        from enat.runtime.backends.cuda import device_index

        device_index("cuda:0")
    except (ImportError, BackendError) as error:
        return str(error)
    return None


def missing(backend: str) -> str | None:
    """Why a backend cannot be tested here."""
    try:
        if "tensorrt" in backend:
            from enat.runtime.backends.tensorrt import start_runtime

            start_runtime()
        if "onnxruntime" in backend:
            import onnxruntime

            from enat.runtime.backends.onnxruntime_cuda import check_packages, load_tensorrt

            onnxruntime.preload_dlls()
            check_packages("TensorrtExecutionProvider" if "tensorrt" in backend else "CUDAExecutionProvider")
            if "tensorrt" in backend:
                load_tensorrt()
    except (ImportError, EnatError) as error:
        return str(error)
    return None


def need(backend: str) -> None:
    """Skips a test of a backend that cannot be tested here; `make test-gpu` leaves out nothing but TensorRT where it is not installed."""
    if reason := missing(backend):
        left_out = "tensorrt" in backend and importlib.util.find_spec("tensorrt") is None
        (pytest.fail if NEEDED and not left_out else pytest.skip)(f"{backend}: {reason}")


NEEDED = os.environ.get("ENAT_TEST_GPU") == "1"
REASON = gpu()
if NEEDED and REASON:
    pytest.exit(REASON, 1)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
ENGINES = [
    ("onnxruntime", "fp32"),
    ("onnxruntime", "fp16"),
    ("onnxruntime-tensorrt", "fp32"),
    ("tensorrt", "fp32"),
    ("tensorrt", "fp16"),
    ("tensorrt", "int8-fp16"),
]
# Of the most likely tokens, equal to float32's on a CPU; and of the pictures, dB.
LIMITS = {"fp32": (0.999, 45), "fp16": (0.99, 45), "int8-fp16": (0.96, 37)}
# ONNX Runtime's TensorRT provider has no option for TF32, which is TensorRT's default.
LIMITS_WITH_TF32 = (0.99, 45)

Copy = Callable[..., Path]


@pytest.fixture(scope="module", params=ENGINES, ids="-".join)
def pipe(request: pytest.FixtureRequest, copies: Copy) -> Iterator[Pipeline]:
    """The bundled engine in a precision on a backend."""
    backend, precision = request.param
    need(backend)
    with Pipeline.load(copies(backend, precision), backend, "cuda:0", slots=2) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """The bundled engine, built for TensorRT where that is what will run it."""
    made: dict[str, Path] = {}

    def engine(precision: str) -> Path:
        if precision not in made:
            from enat.calibration.calibrate import Settings
            from enat.export.convert import Precision, convert_engine

            name, _, float_type = precision.partition("-")
            made[precision] = tmp_path_factory.mktemp("precisions") / precision
            chosen = Precision(name, float_type) if float_type else Precision(name)
            convert_engine(BUNDLED_ENGINE, made[precision], chosen, Settings(images=16) if name == "int8" else None)
        return made[precision]

    def copy(backend: str, precision: str = "fp32", **build: Any) -> Path:
        source = BUNDLED_ENGINE if precision == "fp32" else engine(precision)
        result = Path(shutil.copytree(source, tmp_path_factory.mktemp("engines") / backend))
        if backend == "tensorrt":
            from enat.export.tensorrt_build import build_engine

            cache = tmp_path_factory.getbasetemp() / "timing.cache"  # the builds have most layers in common
            build_engine(result, [8], max_batch=8, timing_cache=cache, **build)
        return result

    return copy


@pytest.fixture
def copying_lane() -> Iterator[Callable[[], Any]]:
    """Lanes that run no graphs, for which CUDA alone is enough."""
    from enat.runtime.backends.cuda import CudaDevice
    from enat.runtime.backends.device_lane import DeviceLane

    class CopyingLane(DeviceLane):
        def execute(self, graph: str, inputs: Any, outputs: Any) -> None:
            raise AssertionError("no graph is run")

        def scratch_of_image(self, graphs: Any) -> None:
            return None

        def modulation_shapes(self) -> dict[str, tuple[int, ...]]:
            return {}

    with contextlib.ExitStack() as stack:

        def lane() -> CopyingLane:
            made = CopyingLane(read_manifest(BUNDLED_ENGINE), CudaDevice(0))
            stack.callback(made.close)
            return made

        yield lane


def copied(lane: Any, columns: int, seed: int) -> bool:
    """Whether arrays that are uploaded, joined, cut and downloaded are what NumPy makes of them; the same columns are the same record."""
    rng = np.random.default_rng(seed)
    arrays = {"a": rng.random((4, columns, 5), np.float32), "b": rng.random((4, 3, 5), np.float32), "positions": np.empty((4, 0), np.int64)}
    program = lambda given: [lane.first_rows(lane.concatenate([given["a"], given["b"], given["a"]]), 2), given["b"]]  # noqa: E731
    joined, b = lane.compute(columns, arrays, program)
    return np.array_equal(joined, np.concatenate([arrays["a"], arrays["b"], arrays["a"]], axis=1)[:2]) and np.array_equal(b, arrays["b"])


def test_memory_and_records(copying_lane: Callable[[], Any]) -> None:
    lane = copying_lane()
    for seed, columns in enumerate((0, 1, 1000, 7) * 4):
        assert copied(lane, columns, seed)
    assert all(record.launch is not None for record in lane.kept.values()) and len(lane.kept) == 4


def test_lanes_do_not_spoil_each_others_records(copying_lane: Callable[[], Any]) -> None:
    """Each makes records while the others take and free memory."""

    def work(lane: Any) -> None:
        lane.enter()
        for seed in range(300):
            assert copied(lane, seed // 3, seed)
            if seed % 30 == 29:
                assert len(lane.kept) == 10 and all(record.launch is not None for record in lane.kept.values())
                lane.forget()
                lane.arena.free_unused()

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of what is not recorded
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, [copying_lane() for _ in range(4)]))


def limits(pipe: Pipeline) -> tuple[float, float]:
    manifest = pipe.manifest
    name = "int8-fp16" if manifest.precision == "int8" else manifest.precision
    return LIMITS_WITH_TF32 if pipe.backend.name == "onnxruntime-tensorrt" else LIMITS[name]


def test_agreement_with_the_cpu(pipe: Pipeline) -> None:
    with Pipeline.load() as reference:
        found = compare(pipe, reference, images=72)
    top1, psnr = limits(pipe)
    assert found.top1 >= top1
    assert found.psnr is not None and found.psnr > psnr
    print(f"{pipe.backend.name}, {pipe.manifest.precision}: {found}; {found.tokens_equal:.1%} of tokens equal when left to itself")


@pytest.mark.parametrize("precision", ["fp32", "int8-fp16"])
@pytest.mark.parametrize("weights", ["stripped", "refittable"])
def test_weights_from_outside_the_plans(copies: Copy, weights: str, precision: str) -> None:
    """Taken from the graphs at load; or from those of another engine, with other weights and scales, without a new build."""
    need("tensorrt")
    import tensorrt

    from enat.export.tensorrt_build import build_engine
    from enat.export.tensorrt_options import FAULTY_REFIT

    if weights == "refittable" and tensorrt.__version__.startswith(FAULTY_REFIT):
        pytest.skip("refittable plans of this TensorRT may compute wrongly")
    engine = copies("tensorrt", precision, weights=weights, level=1)
    if weights == "refittable":
        old, engine = engine, with_other_weights(copies("none", precision))
        try:
            build_engine(engine, [8], max_batch=8, level=1, refit=old)  # plans are taken over by builds of the same options alone
        except BackendError as error:
            # Whether TensorRT lets scales be exchanged it does not document; a plan that would keep the old ones must be refused.
            if precision == "int8-fp16" and "differs, and the plan takes no other in place of it" in str(error):
                pytest.skip(f"TensorRT {tensorrt.__version__}: {error}")
            raise
    with Pipeline.load(engine, "tensorrt", "cuda:0") as pipeline, Pipeline.load(engine, "onnxruntime") as reference:
        assert compare(pipeline, reference, images=36).top1 >= LIMITS[precision][0]


def with_other_weights(engine: Path) -> Path:
    """Floats of the encoder, its scales of 8-bit values among them, a little larger: the pictures are others."""
    model = onnx.load(engine / "encoder.onnx")
    scales = {node.input[1] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for one in model.graph.initializer:
        values = onnx.numpy_helper.to_array(one)
        if values.dtype.kind == "f" and (values.size > 1 or one.name in scales):
            one.CopyFrom(onnx.numpy_helper.from_array(values * values.dtype.type(1.02), one.name))
    onnx.save(model, engine / "encoder.onnx")
    with Pipeline.load(list_anew(engine), "onnxruntime") as changed, Pipeline.load() as before:
        assert not np.array_equal(changed.generate_tokens([1], seed=0), before.generate_tokens([1], seed=0))
    return engine


def test_callbacks(pipe: Pipeline) -> None:
    """Runs that somebody watches give the same pictures, and previews on the way."""
    previews = []
    watched = pipe.generate(range(4), seed=5, callback=lambda step, steps, preview: previews.append(preview()))
    assert (watched == pipe.generate(range(4), seed=5)).mean() > 0.99
    assert len(previews) == 8 and (previews[-1] == watched).mean() > 0.99
    with pytest.raises(Stopped):
        pipe.generate([1], seed=0, callback=lambda step, steps, preview: step == 2)
    assert np.array_equal(pipe.generate(range(4), seed=5), pipe.generate(range(4), seed=5))


def test_loops_are_recorded(pipe: Pipeline) -> None:
    """Each as one launch from its third run on, by any lane."""
    if pipe.backend.name != "tensorrt":
        pytest.skip("ONNX Runtime's runs cannot be recorded")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of what is not recorded
        for _ in range(3):
            pipe.generate([5, 6, 7], seed=1, steps=6)
        with pipe.backend.lease() as lane:  # the one that was given back last
            assert next(reversed(lane.kept.values())).launch is not None  # type: ignore[attr-defined]
            assert not any(record.tries == 0 for record in lane.kept.values())  # type: ignore[attr-defined]


def test_runs_are_repeatable(pipe: Pipeline) -> None:
    """Run, recorded, launched: the same pictures, and others for other seeds and settings."""
    first, *others = (pipe.generate(range(8), seed=3) for _ in range(4))
    assert all((other == first).all() for other in others)
    changed = pipe.generate(range(8), seed=4)
    assert not np.array_equal(changed, first)
    assert np.array_equal(pipe.generate(range(8), seed=4), changed)
    assert not np.array_equal(pipe.generate(range(8), seed=3, guidance=1.0), first)
    assert np.array_equal(pipe.generate(range(8), seed=3), first)


@pytest.mark.parametrize("steps", [1, 3, 8, 40, 64])
@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_any_number_of_steps(pipe: Pipeline, steps: int, guidance: float) -> None:
    """Run, recorded, launched. Of many steps some have the same shapes."""
    tokens, *others = (pipe.generate_tokens([1, 2], seed=0, steps=steps, guidance=guidance) for _ in range(3))
    assert all(np.array_equal(other, tokens) for other in others)
    assert tokens.shape == (2, 8, 8) and tokens.min() >= 0 and tokens.max() < pipe.manifest.model.codes


def test_several_threads(pipe: Pipeline) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda seed: pipe.generate([seed % 36], seed=seed), range(24)))
    for seed, pictures in enumerate(found):
        assert (pictures == pipe.generate([seed % 36], seed=seed)).mean() > 0.99


def test_encode_and_decode(pipe: Pipeline) -> None:
    with Pipeline.load() as reference:
        tokens = reference.generate_tokens(range(4), seed=0)
        difference = np.abs(pipe.decode(tokens).astype(int) - reference.decode(tokens))
        assert difference.max() <= 3 or pipe.manifest.precision != "fp32" or pipe.backend.name == "onnxruntime-tensorrt"  # in TF32
        assert 10 * np.log10(255**2 / np.square(difference, dtype=float).mean().clip(1e-9)) > limits(pipe)[1]
        pictures = reference.decode(tokens)
        assert (pipe.encode(pictures) == reference.encode(pictures)).mean() > 0.99


def test_more_than_the_memory(pipe: Pipeline) -> None:
    """With nearly all of it taken, a batch that needs more: its logits alone on ONNX Runtime; on TensorRT, whose batches are bounded by
    the build, half of what it takes more than a single picture is left. What is named as fitting fits."""
    name = pipe.backend.name
    if name == "onnxruntime-tensorrt":
        pytest.skip("builds for the batch first, and fails there for want of memory")
    from enat.runtime.backends.cuda import CudaDevice
    from enat.runtime.backends.device import DeviceMemoryError

    def taken_for(images: int) -> int:
        with Pipeline.load(pipe.manifest.folder, name, "cuda:0") as alone:
            alone.generate([0] * images, seed=0, steps=8, batch_size=images)
            with alone.backend.lease() as lane:
                return lane.arena.total  # type: ignore[attr-defined, no-any-return]

    if name == "tensorrt":
        images = 8
        left = (taken_for(images) - taken_for(1)) // 2
    else:
        left = 2**30
        images = left // (4 * pipe.manifest.model.length * pipe.manifest.model.codes)
    with Pipeline.load(pipe.manifest.folder, name, "cuda:0") as alone:
        alone.generate([0], seed=0, steps=8)
        device = CudaDevice(0)
        taken: list[int] = []
        piece = device.free_memory()
        while piece >= 2**20:  # what is free need not be free in one piece
            if device.free_memory() - left < piece:
                piece //= 2
                continue
            try:
                taken.append(device.allocate(piece))
            except DeviceMemoryError:
                piece //= 2
        try:
            with pytest.raises(EnatError, match=r"a batch of \d+ (may fit|fits)|not even one fits") as info:
                alone.generate([0] * images, seed=0, steps=8, batch_size=images)
            if fitting := re.search(r"a batch of (\d+) fits", str(info.value)):
                assert len(alone.generate([0] * int(fitting[1]), seed=0, steps=8, batch_size=int(fitting[1]))) == int(fitting[1])
        finally:
            for address in taken:
                device.free(address)
            device.close()
        assert len(alone.generate([0], seed=0)) == 1
