"""OpenVINO: the same pictures as ONNX Runtime, but for rounding."""

from __future__ import annotations

import errno
import functools
import gc
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
from conftest import invoke, list_anew, refused
from numpy.typing import NDArray

from enat import Pipeline
from enat.errors import BackendError, EngineError, InputError
from enat.export.compare import compare
from enat.runtime import backends
from enat.runtime.backends import openvino_cache, openvino_cpu, openvino_graphs
from enat.runtime.backends.openvino_cache import GraphCache
from enat.runtime.backends.openvino_cpu import CompiledGraphs, Kernels, graph_form, graph_options
from enat.runtime.cli import main
from enat.runtime.manifest import Manifest
from enat.runtime.pipeline import Preview

CLASSES = range(36)
GRAPHS = ("condition", "encoder", "decoder", "sampler", "image_decoder")  # that pictures need

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def openvino(cache: Path) -> Iterator[Pipeline]:
    with Pipeline.load(backend="openvino") as pipeline:
        yield pipeline


def test_tokens_of_two_hundred_pictures(openvino: Pipeline, reference: Pipeline) -> None:
    found, wanted = (pipe.generate_tokens(CLASSES, num=6, seed=0) for pipe in (openvino, reference))
    assert len(found) == 216
    assert (found == wanted).mean() >= 0.99


@pytest.mark.parametrize("steps", [1, 3, 64])
@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_pictures(openvino: Pipeline, reference: Pipeline, steps: int, guidance: float) -> None:
    found, wanted = (pipe.generate([1, 2, 3], seed=0, steps=steps, guidance=guidance).astype(int) for pipe in (openvino, reference))
    assert (np.abs(found - wanted).max((1, 2, 3)) <= 1).sum() >= 2


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
    """A CPU without VNNI, as OpenVINO's kernels take it from this variable, adds pairs of 8-bit products in too few bits."""

    def draw(backend: str, **environment: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; from enat.runtime.cli import main; main(sys.argv[1:])"
        asked = ["--engine", str(precisions["int8"]), "--class", "A", "--out", str(tmp_path / "a.png"), "--backend", backend]
        return subprocess.run(
            [sys.executable, "-c", code, *asked], capture_output=True, text=True, check=False, env={**os.environ, **environment}
        )

    refusal = draw("openvino", ONEDNN_MAX_CPU_ISA="AVX2")
    assert refusal.returncode == 1 and not (tmp_path / "a.png").exists()
    assert "int8 kernels overflow" in refusal.stderr and "--backend onnxruntime has" in refusal.stderr
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if "avx512_vnni" in flags or "avx_vnni" in flags:
        assert draw("openvino").returncode == 0


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


def draw_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.uint8]:
    monkeypatch.setenv("ENAT_CACHE", str(folder))
    with Pipeline.load(backend="openvino") as pipeline:
        return pipeline.generate([1, 2], seed=0)


def test_compiled_graphs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, openvino: Pipeline) -> None:
    wanted = draw_in(tmp_path, monkeypatch)
    folder = tmp_path / "openvino" / openvino.manifest.hash[:16]
    assert {path.name.partition("-")[0] for path in folder.iterdir()} == set(GRAPHS)
    with monkeypatch.context() as without:
        without.delattr(CompiledGraphs, "compile")
        assert (draw_in(tmp_path, monkeypatch) == wanted).all()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_damaged_files_of_the_cache_are_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path, openvino: Pipeline, share: float
) -> None:
    wanted = draw_in(cache, monkeypatch)
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    files = [file for graph in GRAPHS for file in (tmp_path / "openvino" / openvino.manifest.hash[:16]).glob(f"{graph}-*.blob")]
    sizes = {file: file.stat().st_size for file in files}
    assert len(sizes) == len(GRAPHS)
    for file, size in sizes.items():
        os.truncate(file, int(share * size))
    assert (draw_in(tmp_path, monkeypatch) == wanted).all()
    assert all(file.stat().st_size > share * size for file, size in sizes.items())


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    wanted = draw_in(cache, monkeypatch)

    def write(path: Path, data: bytes) -> int:
        path.open("wb").write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.warns(RuntimeWarning, match="-.*blob: not usable, the graph is compiled again at the next start: the disk is full"):
        assert (draw_in(tmp_path, monkeypatch) == wanted).all()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_decides_whether_a_kept_graph_is_taken(monkeypatch: pytest.MonkeyPatch, openvino: Pipeline) -> None:
    core, manifest = ov.Core(), openvino.manifest

    def key(manifest: Manifest = manifest, tiles: bool = False, **options: Any) -> str | None:
        options = {"INFERENCE_PRECISION_HINT": "f32", **options}
        file = GraphCache(core, manifest, lambda graph: options, lambda graph: {"tiles": tiles}, ["encoder"]).file("encoder")
        return file and file.name

    assert key() is not None and key() == key(INFERENCE_NUM_THREADS=1)
    keys = [key(), key(replace(manifest, hash="another")), key(INFERENCE_PRECISION_HINT="bf16"), key(tiles=True)]
    for module, name, value in ((ov, "__version__", "another"), (openvino_cache, "source_hash", lambda module: "another")):
        with monkeypatch.context() as changed:
            changed.setattr(module, name, value)
            keys.append(key())
    core = SimpleNamespace(get_property=lambda device, name: "another")  # type: ignore[assignment]
    keys.append(key())
    assert len(set(keys)) == 7


def test_graphs_that_are_not_the_manifests_are_not_kept(engine_copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Large files are not hashed at every load, and a graph compiled from a damaged one would outlive its repair."""
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("enat.runtime.manifest.HASHED_AT_LOAD", 0)
    file = engine_copy / "encoder.onnx"
    right = file.read_bytes()
    file.write_bytes(right[:-2000] + bytes(1000) + right[-1000:])
    with Pipeline.load(engine_copy, "openvino") as pipeline:
        for _ in range(2):
            with pytest.raises(EngineError, match=r"encoder\.onnx: sha256 .* the file was altered"):
                pipeline.generate([1], seed=0)
        assert not list((tmp_path / "cache").rglob("encoder-*"))
        file.write_bytes(right)
        found = pipeline.generate([1], seed=0).astype(int)
    with Pipeline.load(engine_copy, "onnxruntime") as reference:
        assert np.abs(found - reference.generate([1], seed=0)).max() <= 1


def test_auto_does_not_draw_with_altered_files(engine_copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """That OpenVINO found, before it keeps what it made of them: another backend would read the same ones."""
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("enat.runtime.manifest.HASHED_AT_LOAD", 0)
    monkeypatch.setattr(backends, "WIDE", 0)  # so that OpenVINO is tried first
    file = engine_copy / "encoder.onnx"
    right = file.read_bytes()
    file.write_bytes(right[:-2000] + bytes(1000) + right[-1000:])
    with pytest.raises(EngineError, match=r"encoder\.onnx: sha256 .* the file was altered"):
        Pipeline.load(engine_copy)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory is looked at as Linux tells it")
def test_pages_of_the_cache_are_given_back(openvino: Pipeline) -> None:
    openvino.generate([1], seed=0)
    resident, size, inside = 0, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = line.endswith(".blob")
        elif inside and words[0] in ("Size:", "Rss:"):
            size, resident = size + int(words[1]) * (words[0] == "Size:"), resident + int(words[1]) * (words[0] == "Rss:")
    assert 4 * resident < size


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


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers: neither HOME, nor an entry for the user."""
    for name in ("ENAT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    with pytest.warns(RuntimeWarning, match="home directory, and ENAT_CACHE is not set; graphs are compiled at every start"):
        Pipeline.load(backend="openvino").close()


def test_a_cache_that_holds_all_may_be_read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in the image of a container. The folder stays the one that it was, wherever the program goes."""
    monkeypatch.chdir(tmp_path)
    wanted = draw_in(Path("kept"), monkeypatch)

    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with monkeypatch.context() as without:
        without.delattr(CompiledGraphs, "compile")
        with Pipeline.load(backend="openvino") as pipeline:
            monkeypatch.chdir("/")
            assert (pipeline.generate([1, 2], seed=0) == wanted).all()
    monkeypatch.chdir(tmp_path)
    next(tmp_path.rglob("encoder-*")).unlink()
    with pytest.raises(InputError, match=r"the cache folder \(ENAT_CACHE\) cannot be written: Read-only file system"):
        Pipeline.load(backend="openvino")


def test_a_cache_that_cannot_be_looked_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where a container runs as another user than the one that HOME is of."""
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path))
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if path.is_relative_to(tmp_path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(InputError, match=r"the cache folder \(ENAT_CACHE\) cannot be written: Permission denied"):
        Pipeline.load(backend="openvino")
    monkeypatch.delenv("ENAT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="graphs are compiled at every start"):
        Pipeline.load(backend="openvino").close()


def test_a_cpu_that_openvino_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("Exception from src/core.cpp:1:\nno plugin for it\nmore of it")

    monkeypatch.setattr(backends, "WIDE", 0)  # so that OpenVINO is tried first
    monkeypatch.setattr(ov, "Core", refuse)
    with pytest.raises(BackendError, match=r"OpenVINO .* cannot use this CPU: no plugin for it$"):
        Pipeline.load(backend="openvino")
    with pytest.warns(RuntimeWarning, match="openvino is passed over: .*no plugin for it"), Pipeline.load() as pipeline:
        assert pipeline.backend.name == "onnxruntime"


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "file"))
    result = invoke(main, "--class", "A", "--out", tmp_path / "a.png", "--backend", "openvino")
    refused(result, "the cache folder (ENAT_CACHE) cannot be written")
    monkeypatch.delenv("ENAT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="graphs are compiled at every start"):
        Pipeline.load(backend="openvino").close()
    monkeypatch.setenv("ENAT_CACHE", "")
    with Pipeline.load(backend="openvino", threads=1) as pipeline:
        assert pipeline.generate([1], seed=0).shape == (1, 64, 64, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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
