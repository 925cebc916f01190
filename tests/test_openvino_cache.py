"""Compiled graphs that OpenVINO's backend keeps in the cache folder."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import pytest
from conftest import invoke, refused
from numpy.typing import NDArray
from test_openvino import GRAPHS

from enat import Pipeline
from enat.errors import EngineError, InputError
from enat.runtime import backends
from enat.runtime.backends import openvino_cache
from enat.runtime.backends.openvino_cache import GraphCache
from enat.runtime.backends.openvino_cpu import CompiledGraphs
from enat.runtime.cli import main
from enat.runtime.manifest import Manifest

pytestmark = pytest.mark.usefixtures("cache")


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


def alter(file: Path) -> bytes:
    """Puts zeros into a graph's file → what it held."""
    right = file.read_bytes()
    file.write_bytes(right[:-2000] + bytes(1000) + right[-1000:])
    return right


def test_graphs_that_are_not_the_manifests_are_not_kept(engine_copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Large files are not hashed at every load, and a graph compiled from a damaged one would outlive its repair."""
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("enat.runtime.manifest.HASHED_AT_LOAD", 0)
    file = engine_copy / "encoder.onnx"
    right = alter(file)
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
    alter(engine_copy / "encoder.onnx")
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


def test_what_nobody_reads_any_more_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, openvino: Pipeline) -> None:
    """Where another graph is kept. What is read stays, however old it is; and so does what is no graph."""
    draw_in(tmp_path, monkeypatch)
    mine = tmp_path / "openvino" / openvino.manifest.hash[:16]
    theirs = tmp_path / "openvino" / "of another engine"
    theirs.mkdir()
    for path in (theirs / "encoder-0123.blob", theirs / "notes.txt"):
        path.touch()
    for path in (*theirs.iterdir(), *mine.iterdir()):
        os.utime(path, (0, 0))
    draw_in(tmp_path, monkeypatch)
    kept = {path.name for path in mine.iterdir()}
    assert len(list(theirs.iterdir())) == 2
    (mine / next(name for name in kept if name.startswith("sampler-"))).unlink()
    draw_in(tmp_path, monkeypatch)
    assert {path.name for path in mine.iterdir()} == kept
    assert [path.name for path in theirs.iterdir()] == ["notes.txt"]
