"""OpenVINO: the same pictures as ONNX Runtime, but for rounding."""

from __future__ import annotations

import functools
import gc
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
from conftest import list_anew

from enat import Pipeline
from enat.errors import BackendError, InputError
from enat.export.compare import compare
from enat.runtime import backends
from enat.runtime.backends import openvino_cpu, openvino_graphs
from enat.runtime.backends.openvino_cache import GraphCache
from enat.runtime.backends.openvino_cpu import Kernels, graph_form, graph_options
from enat.runtime.pipeline import Preview

CLASSES = range(36)
GRAPHS = ("condition", "encoder", "decoder", "sampler", "image_decoder")  # that pictures need

pytestmark = pytest.mark.usefixtures("cache")


def test_tokens_of_two_hundred_pictures(openvino: Pipeline, reference: Pipeline) -> None:
    found, wanted = (pipe.generate_tokens(CLASSES, num=6, seed=0) for pipe in (openvino, reference))
    assert len(found) == 216
    assert (found == wanted).mean() >= 0.99


@pytest.mark.parametrize("steps", [1, 3, 64])
@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_pictures(openvino: Pipeline, reference: Pipeline, steps: int, guidance: float) -> None:
    found, wanted = (pipe.generate([1, 2, 3], seed=0, steps=steps, guidance=guidance).astype(int) for pipe in (openvino, reference))
    assert (np.abs(found - wanted).max((1, 2, 3)) <= 1).sum() >= 2


@pytest.mark.parametrize("steps", [9, 16, 64])
def test_runs_that_begin_with_a_single_token(reference: Pipeline, steps: int) -> None:
    """Which the encoder must not meet before any others: with OpenVINO's kernels of that moment all pictures were wrong from then on."""
    assert reference.schedule(steps=steps)[1].new == 1
    with Pipeline.load(backend="openvino") as fresh:
        for asked in (steps, 8):
            found, wanted = (pipe.generate_tokens(CLASSES, seed=0, steps=asked) for pipe in (fresh, reference))
            assert (found == wanted).mean() >= 0.99


@pytest.mark.parametrize("name", ["fp16", "int8", "int8-fp16"])
def test_what_was_drawn_before_does_not_matter(precisions: dict[str, Path], name: str) -> None:
    """Nor which shapes a process meets first."""
    drawn = []
    for first in (1, 8, 16):
        with Pipeline.load(precisions[name], "openvino") as fresh:
            drawn.append({steps: fresh.generate_tokens([1, 2, 3], seed=0, steps=steps) for steps in (first, 1, 16, 8)})
    assert all((one[steps] == drawn[0][steps]).all() for one in drawn for steps in (1, 8, 16))


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int8-fp16"])
def test_batches_do_not_change_pictures(precisions: dict[str, Path], cache: Path, name: str) -> None:
    with Pipeline.load(precisions.get(name), "openvino") as pipeline:
        one, five, all_at_once = (pipeline.generate_tokens(CLASSES, seed=3, batch_size=size) for size in (1, 5, 36))
    assert (one == five).all() and (one == all_at_once).all()


@pytest.mark.parametrize(("name", "top1", "psnr"), [("fp16", 0.98, 50), ("int8", 0.97, 37), ("int8-fp16", 0.97, 37)])
def test_other_precisions(precisions: dict[str, Path], reference: Pipeline, name: str, top1: float, psnr: float) -> None:
    """float16 engines may compute in bfloat16 here; 8-bit ones hold what they are held to on ONNX Runtime."""
    with Pipeline.load(precisions[name], "openvino") as engine:
        found = compare(engine, reference, images=72, seed=31337)
    assert found.top1 >= top1
    assert found.psnr is not None and found.psnr >= psnr


@pytest.mark.parametrize(
    ("name", "slow", "fast"),
    [("fp32", set(), set()), ("fp16", set(), {*GRAPHS}), ("int8", {"image_decoder"}, {"encoder", "decoder", "image_decoder"})],
)
def test_what_computes_in_bfloat16(precisions: dict[str, Path], name: str, slow: set[str], fast: set[str]) -> None:
    """Where the CPU has it, and where it is faster than float32, which decides what a compiled graph is kept for."""
    with Pipeline.load(precisions.get(name), "openvino") as engine:
        core, manifest = engine.backend.graphs.core, engine.manifest
    expected: list[tuple[Kernels, set[str]]] = [
        (Kernels(), set()),
        (Kernels(bfloat16=True), slow),
        (Kernels(bfloat16=True, fast_bfloat16=True), fast),
    ]
    files = []
    for kernels, graphs in expected:
        options = functools.partial(graph_options, manifest.precision, kernels, None)
        form = functools.partial(graph_form, manifest.precision, kernels)
        assert {graph for graph in GRAPHS if options(graph)["INFERENCE_PRECISION_HINT"] == "bf16"} == graphs
        assert {graph for graph in GRAPHS if form(graph)["bfloat16"]} == graphs
        files.append({graph: GraphCache(core, manifest, options, form, GRAPHS).file(graph) for graph in GRAPHS})
        assert {graph for graph in GRAPHS if files[-1][graph] != files[0][graph]} == graphs


@pytest.mark.parametrize("fast", [False, True])
def test_keys_and_values_are_joined_in_bfloat16(precisions: dict[str, Path], monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """In float32 copying them costs more than fewer nodes gain."""
    joined: list[bool] = []
    monkeypatch.setenv("ENAT_CACHE", "")
    monkeypatch.setattr(Kernels, "of", lambda core: Kernels(bfloat16=fast, fast_bfloat16=fast))
    monkeypatch.setattr(openvino_graphs, "ease_attention", lambda scores, join=False: joined.append(join))
    with Pipeline.load(precisions["int8"], "openvino") as engine:
        assert engine.generate_tokens([1], seed=0).shape == (1, 8, 8)
    assert set(joined) == {fast}


def test_kernels_of_this_machine() -> None:
    kernels = Kernels.of(ov.Core())
    if Path("/proc/cpuinfo").exists() and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        flags = set(Path("/proc/cpuinfo").read_text().split())
        assert kernels.tiles == ("amx_int8" in flags)
        assert kernels.bfloat16 >= bool({"avx512_bf16", "amx_bf16"} & flags)
        assert kernels.fast_bfloat16 == (kernels.bfloat16 and bool({"amx_int8", "AuthenticAMD"} & flags))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="no x86 CPU: its kernels do not saturate")
def test_kernels_that_saturate(precisions: dict[str, Path], tmp_path: Path) -> None:
    """A CPU without VNNI, as OpenVINO's kernels take it from this variable, adds pairs of 8-bit products in too few bits: 62 to 69 % of the
    tokens were those of others. Kernels for floats are slower, and right."""
    code = "import sys; from enat.runtime.cli import main; main(sys.argv[1:])"
    asked = ["--engine", str(precisions["int8"]), "--class", "all", "--seed", "1", "--backend", "openvino", "--out", "tokens.npy"]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    said = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert "int8 kernels overflow (it has no VNNI), so OpenVINO computes as in float32" in said.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where this CPU has no VNNI
        with Pipeline.load(precisions["int8"], "onnxruntime") as right:
            expected = right.generate_tokens(CLASSES, seed=1)
    assert (np.load(tmp_path / "tokens.npy") == expected).mean() > 0.9


def test_auto_takes_another_where_kernels_saturate(int7: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the weights' bits, if there is another."""
    monkeypatch.setattr(backends, "WIDE_IN_8_BITS", 0)  # so that OpenVINO is tried first
    monkeypatch.setattr(Kernels, "of", lambda core: Kernels(saturate=True))
    with pytest.warns(RuntimeWarning, match="openvino is passed over: .*int8 kernels overflow.*as in float32"), Pipeline.load(int7) as pipe:
        assert pipe.backend.name == "onnxruntime"
    with monkeypatch.context() as alone:
        alone.setattr(openvino_cpu, "find_spec", lambda name: None)
        with Pipeline.load(int7) as pipe, pytest.warns(RuntimeWarning, match="int8 kernels overflow.*as in float32"):
            assert pipe.backend.name == "openvino"
            one, all_at_once = (pipe.generate_tokens(CLASSES, seed=3, batch_size=size) for size in (1, 36))
            assert (one == all_at_once).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Pipeline.load(backend="openvino") as pipe:
            pipe.generate_tokens([1], seed=0)


def test_encode_and_previews(openvino: Pipeline, reference: Pipeline) -> None:
    pictures = reference.generate(CLASSES, seed=0)
    assert (openvino.encode(pictures) == reference.encode(pictures)).mean() > 0.99
    seen: list[tuple[int, ...]] = []

    def watch(step: int, steps: int, preview: Preview) -> None:
        seen.append(preview().shape)

    openvino.generate([1, 2], seed=0, callback=watch)
    assert seen == [(2, 64, 64, 3)] * 8


def test_threads_share_a_pipeline(openvino: Pipeline) -> None:
    with Pipeline.load(backend="openvino", slots=4) as shared, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: shared.generate([seed], seed=seed), range(12)))
    for seed, pictures in enumerate(found):
        assert (pictures == openvino.generate([seed], seed=seed)).all()


@pytest.mark.skipif(not openvino_cpu.MALLOC_TRIM, reason="no glibc")
def test_memory_between_batches_is_given_back(openvino: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a while."""
    given: list[int] = []
    monkeypatch.setattr(openvino_cpu, "MALLOC_TRIM", given.append)
    openvino.generate([1], seed=0)
    openvino.generate([1], seed=0)
    assert len(given) <= 1
    monkeypatch.setattr(openvino_cpu, "TRIM_SECONDS", 0)
    given.clear()
    openvino.generate([1, 2, 3], seed=0, batch_size=1)
    assert given == [0, 0, 0]


def test_closed_while_in_use(cache: Path) -> None:
    with Pipeline.load(backend="openvino") as pipeline:
        wanted = pipeline.generate([1], seed=0)
    pipeline = Pipeline.load(backend="openvino")

    def close(step: int, steps: int, preview: Preview) -> None:
        pipeline.close()
        gc.collect()

    assert (pipeline.generate([1], seed=0, callback=close) == wanted).all()


def test_arrays_that_cannot_be_written(openvino: Pipeline) -> None:
    pictures = openvino.generate([1, 2], seed=0)
    wanted = openvino.encode(pictures)
    turned = np.asfortranarray(pictures)
    pictures.flags.writeable = False
    for _ in range(10):
        assert (openvino.encode(pictures) == wanted).all()
        assert (openvino.encode(turned) == wanted).all()
        assert (openvino.encode(pictures[::-1]) == wanted[::-1]).all()


def test_a_cpu_that_openvino_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("Exception from src/core.cpp:1:\nno plugin for it\nmore of it")

    with monkeypatch.context() as changed:
        changed.setattr(ov.Core, "available_devices", [])
        with pytest.raises(BackendError, match="found no CPU that it can use"):
            Pipeline.load(backend="openvino")
    monkeypatch.setattr(backends, "WIDE", 0)  # so that OpenVINO is tried first
    monkeypatch.setattr(ov, "Core", refuse)
    with pytest.raises(BackendError, match=r"OpenVINO .* cannot use this CPU: no plugin for it$"):
        Pipeline.load(backend="openvino")
    with pytest.warns(RuntimeWarning, match="openvino is passed over: .*no plugin for it"), Pipeline.load() as pipeline:
        assert pipeline.backend.name == "onnxruntime"


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, engine_copy: Path) -> None:
    with pytest.raises(InputError, match="the backend openvino runs on cpu, got the device 'cuda:0'"):
        Pipeline.load(backend="openvino", device="cuda:0")
    monkeypatch.setenv("ENAT_CACHE", "")
    (engine_copy / "encoder.onnx").write_bytes(b"damaged")
    with (
        Pipeline.load(list_anew(engine_copy), "openvino") as pipeline,
        pytest.raises(BackendError, match=r"encoder\.onnx: OpenVINO .* cannot load it"),
    ):
        pipeline.generate([1], seed=0)
    monkeypatch.delitem(sys.modules, "enat.runtime.backends.openvino_cpu")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r'pip install "enat\[openvino\]"'):
        Pipeline.load(backend="openvino")


def test_auto_takes_it_where_there_is_nothing_else(tmp_path: Path) -> None:
    code = "import sys; sys.modules['onnxruntime'] = None; from enat import Pipeline; print(Pipeline.load().backend.name)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout.strip() == "openvino"


def test_auto_passes_over_it_where_it_cannot_compile_a_graph(engine_copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backends, "WIDE", 0)  # so that OpenVINO is tried first
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    with Pipeline.load(engine_copy) as pipeline:
        assert pipeline.backend.name == "openvino"
    with Pipeline.load(engine_copy, "onnxruntime") as pipeline:
        wanted = pipeline.generate_tokens(1, seed=1)
    model = onnx.load(engine_copy / "encoder.onnx")
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [f"{name}_before" if name == output else name for name in node.output]
    # Operators of ONNX Runtime's own, which change nothing.
    model.graph.initializer.append(onnx.helper.make_tensor("axis", onnx.TensorProto.INT32, [], [0]))
    model.graph.initializer.append(onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [1], [0]))
    model.graph.node.append(onnx.helper.make_node("ExpandDims", [f"{output}_before", "axis"], ["expanded"], domain="com.microsoft"))
    model.graph.node.append(onnx.helper.make_node("Squeeze", ["expanded", "axes"], [output]))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, engine_copy / "encoder.onnx")
    with pytest.warns(RuntimeWarning, match=r"openvino is passed over: .*encoder\.onnx: OpenVINO .* cannot load it"):
        pipeline = Pipeline.load(list_anew(engine_copy))
    with pipeline:
        assert pipeline.backend.name == "onnxruntime"
        assert (pipeline.generate_tokens(1, seed=1) == wanted).all()


@pytest.mark.parametrize("loaded", ["", "generate_tokens", "generate"])
def test_a_process_that_is_forked(tmp_path: Path, loaded: str) -> None:
    """What is loaded is drawn with; for what is not, OpenVINO would wait forever."""
    code = f"""
import os
from enat import BackendError, Pipeline
pipeline = Pipeline.load(backend="openvino")
{f"pipeline.{loaded}(7, seed=1)" if loaded else ""}
if os.fork():
    os.wait()
print(pipeline.generate_tokens(7, seed=1).sum(), flush=True)
if os.getppid() == {os.getpid()}:
    raise SystemExit
try:
    print(pipeline.encode(pipeline.generate(7, seed=1)).sum())
    print(Pipeline.load(backend="openvino").generate_tokens(7, seed=1).sum())
except BackendError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60).stdout
    *child, parent = said.splitlines()
    assert child[0] == parent
    if loaded:
        assert child[1].startswith("OpenVINO loaded graphs before this process was forked")
    else:
        assert child[2] == parent


@pytest.mark.skipif(sys.platform != "linux", reason="seen on Linux alone")
def test_signals_are_handled_when_pipelines_are_closed(engines: Callable[[str], Path]) -> None:
    """OpenVINO leaves threads with a stack for signals that is gone: the next one would kill the process, as a server's SIGTERM."""
    code = f"""
import gc, signal
from enat import Pipeline
pipes = [Pipeline.load({str(engines("tiny"))!r}, "openvino") for _ in range(2)]
for pipe in pipes:
    pipe.generate([1])
signal.signal(signal.SIGTERM, lambda *_: print("stops well"))
signal.raise_signal(signal.SIGTERM)
while pipes:
    pipes.pop().close()
del pipe
gc.collect()
signal.raise_signal(signal.SIGTERM)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "stops well\n" * 2), result
