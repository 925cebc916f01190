"""Engines that are moved or replaced while programs have them loaded, or load them."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import list_anew
from cpp_library import done

import enat.runtime.manifest as manifest_module
from enat import Pipeline
from enat.errors import EngineError
from enat.runtime.files import exchange, replace_folder
from enat.runtime.manifest import manifest_text, read_manifest
from enat.runtime.pipeline import BUNDLED_ENGINE

BACKENDS = pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])


@BACKENDS
def test_an_engine_stays_the_one_that_was_loaded(engine_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Wherever the program goes, and a link leads, before the first picture."""
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    wanted = Pipeline.load(engine_copy, "onnxruntime").generate([1], seed=1)
    monkeypatch.chdir(tmp_path)
    Path("current").symlink_to(engine_copy)
    loaded = [Pipeline.load(engine_copy.relative_to(tmp_path), backend), Pipeline.load("current", backend)]
    Path("current").unlink()
    monkeypatch.chdir("/")
    for pipeline in loaded:
        assert np.abs(pipeline.generate([1], seed=1).astype(int) - wanted).max() <= (backend != "onnxruntime")


@BACKENDS
@pytest.mark.parametrize("cached", [False, True])
def test_an_engine_that_is_replaced_before_it_is_used(
    engine_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, cached: bool
) -> None:
    """Another engine in its place is not taken for it; the same one again is."""
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache") if cached else "")
    other = Path(shutil.copytree(engine_copy, tmp_path / "other"))
    graph = onnx.load(other / "decoder.onnx")
    graph.producer_name = "other"
    onnx.save(graph, other / "decoder.onnx")
    list_anew(other)
    first, second = (Pipeline.load(engine_copy, backend) for _ in range(2))
    same = Path(shutil.copytree(engine_copy, tmp_path / "same"))
    replace_folder(engine_copy, same, tmp_path / "old")
    assert first.generate([1], seed=1).any()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    replace_folder(engine_copy, other, tmp_path / "old 2")
    for _ in range(2):
        with pytest.raises(EngineError, match=r"decoder\.onnx: .*; it was replaced after the engine had been loaded: load it again"):
            second.generate([1], seed=1)
    assert first.generate([1], seed=1).any()  # it has what it had


def test_an_engine_that_is_replaced_while_it_is_read(engine_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an export that ends just then: it is read again."""
    other = Path(shutil.copytree(engine_copy, tmp_path / "other"))
    content = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_bytes(manifest_text({**content, "sampling": {**content["sampling"], "steps": 3}}))
    hashed, swaps = manifest_module.sha256, iter([True])

    def swapping(path: Path) -> str:
        if next(swaps, False):
            replace_folder(engine_copy, other, tmp_path / "old")
            (engine_copy / "sampler.onnx").unlink()  # as if the two had other files
            shutil.copy(tmp_path / "old" / "sampler.onnx", engine_copy)
            return "0" * 64
        return hashed(path)

    monkeypatch.setattr(manifest_module, "sha256", swapping)
    assert read_manifest(engine_copy).sampling.steps == 3


def test_a_graph_that_is_replaced_while_it_is_read(engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it was the engine's when reading began: nobody knows what was read."""
    session = ort.InferenceSession

    def replacing(path: Path, *rest: Any, **named: Any) -> Any:
        data, made = path.read_bytes(), session(path, *rest, **named)
        path.unlink()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return made

    monkeypatch.setattr(ort, "InferenceSession", replacing)
    with (
        Pipeline.load(engine_copy, "onnxruntime") as pipeline,
        pytest.raises(EngineError, match="it was replaced after the engine had been loaded: load it again"),
    ):
        pipeline.generate([1], seed=1)


def test_the_cpp_library_reads_one_engine(plain: Path, tmp_path: Path) -> None:
    """Whatever is put in its place while it opens it: never a part of one and a part of the other."""
    engine, other = (Path(shutil.copytree(BUNDLED_ENGINE, tmp_path / name)) for name in ("engine", "other"))
    graph = onnx.load(other / "decoder.onnx")
    (bias,) = [one for one in graph.graph.initializer if one.name == "mlm_layer.words.bias"]
    values = onnx.numpy_helper.to_array(bias)
    bias.CopyFrom(onnx.numpy_helper.from_array(np.roll(values, 100), bias.name))
    onnx.save(graph, other / "decoder.onnx")
    list_anew(other)

    def tokens() -> bytes:
        done(plain / "enat-run-cpp", "--engine", engine, "--class", "R", "--seed", 1, "--out", tmp_path / "tokens.npy")
        return (tmp_path / "tokens.npy").read_bytes()

    wanted = {tokens()}
    replace_folder(engine, other, tmp_path / "old")
    (tmp_path / "old").rename(other)
    wanted.add(tokens())
    assert len(wanted) == 2
    ended = threading.Event()

    def swap() -> None:
        while not ended.wait(2):  # slow machines take a second to open it
            replace_folder(engine, other, tmp_path / "old")
            (tmp_path / "old").rename(other)

    with ThreadPoolExecutor(1) as pool:
        swapping = pool.submit(swap)
        try:
            found = {tokens() for _ in range(12)}
        finally:
            ended.set()
        swapping.result()
    assert found <= wanted


def test_folders_change_places_in_one_moment(tmp_path: Path) -> None:
    """There is none without an engine in its place."""
    for name in ("out", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    done = threading.Event()

    def look() -> bool:
        found = True
        while not done.is_set():
            found &= (tmp_path / "out" / "name").exists()
        return found

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(look)
        try:
            for i in range(200):
                replace_folder(tmp_path / "out", tmp_path / "new", tmp_path / f"old {i}")
                (tmp_path / f"old {i}").rename(tmp_path / "new")
        finally:
            done.set()
        if exchange(tmp_path / "out", tmp_path / "new"):
            assert found.result()
