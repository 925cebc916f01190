"""On an NVIDIA GPU: what cannot be told without one. `make test-gpu`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from enat import Pipeline
from enat.errors import BackendError, EnatError
from enat.export.compare import compare
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
            import tensorrt

            tensorrt.Runtime(tensorrt.Logger())
        if "onnxruntime" in backend:
            import onnxruntime

            from enat.runtime.backends.onnxruntime_cuda import check_packages, load_tensorrt

            onnxruntime.preload_dlls()
            check_packages("TensorrtExecutionProvider" if "tensorrt" in backend else "CUDAExecutionProvider")
            if "tensorrt" in backend:
                load_tensorrt()
    except (ImportError, EnatError, TypeError) as error:
        return str(error)
    return None


REASON = gpu()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
BACKENDS = ("onnxruntime", "onnxruntime-tensorrt", "tensorrt")


@pytest.fixture(scope="module", params=BACKENDS)
def pipe(request: pytest.FixtureRequest, copies: Callable[[str], Path]) -> Pipeline:
    """The bundled engine on a backend."""
    reason = missing(request.param)
    if reason:
        pytest.skip(reason)
    return Pipeline.load(copies(request.param), request.param, "cuda:0", slots=2)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundled engine, built for TensorRT where that is what will run it."""
    import shutil

    def copy(backend: str) -> Path:
        engine = Path(shutil.copytree(BUNDLED_ENGINE, tmp_path_factory.mktemp("engines") / backend))
        if backend == "tensorrt":
            from enat.export.tensorrt_build import build_engine

            build_engine(engine, [8], max_batch=8)
        return engine

    return copy


def test_agreement_with_the_cpu(pipe: Pipeline) -> None:
    with Pipeline.load() as reference:
        found = compare(pipe, reference, images=72)
    # ONNX Runtime's TensorRT provider has no option for TF32, which is TensorRT's default.
    assert found.top1 >= (0.99 if pipe.backend.name == "onnxruntime-tensorrt" else 0.999)
    assert found.psnr is not None and found.psnr > 45
    print(f"{pipe.backend.name}: {found}; {found.tokens_equal:.1%} of tokens equal when left to itself")


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
    if pipe.backend.name == "onnxruntime-tensorrt" and steps > 8:
        pytest.skip("builds its engines again whenever a step's shapes leave the range that it knows")
    tokens = pipe.generate_tokens([1, 2], seed=0, steps=steps, guidance=guidance)
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
        assert difference.max() <= 3
        pictures = reference.decode(tokens)
        assert (pipe.encode(pictures) == reference.encode(pictures)).mean() > 0.99


def test_more_than_the_memory(pipe: Pipeline) -> None:
    """With all but 1 GiB of it taken, a batch whose logits alone are that large."""
    if pipe.backend.name == "onnxruntime-tensorrt":
        pytest.skip("builds for the batch first, and fails there for want of memory")
    from enat.runtime.backends.cuda import CudaDevice

    images = 2**30 // (4 * pipe.manifest.model.length * pipe.manifest.model.codes)
    device = CudaDevice(0)
    taken = device.allocate(device.free_memory() - 2**30)
    try:
        with pytest.raises(EnatError, match=r"a batch of \d+ fits|not even one fits|expected at most 8"):
            pipe.generate([0] * images, seed=0, steps=2, batch_size=images)
    finally:
        device.free(taken)
        device.close()
    assert pipe.generate([0], seed=0).shape[0] == 1
