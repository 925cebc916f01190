"""Engines that are incomplete, altered, foreign or too new are refused, with a line that names the file."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import invoke, list_anew, put_anything_anywhere, refused
from hypothesis import given
from hypothesis import strategies as st

from enat import EnatError, Pipeline
from enat.errors import EngineError
from enat.runtime.cli import main
from enat.runtime.manifest import read_manifest


def change(engine: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((engine / "manifest.json").read_text())
    edit(data)
    (engine / "manifest.json").write_text(json.dumps(data))


def test_a_whole_engine(engine_copy: Path) -> None:
    manifest = read_manifest(engine_copy, verify=True)
    assert manifest.model.length == 64
    assert set(manifest.files) == {
        "condition.onnx", "encoder.onnx", "decoder.onnx", "sampler.onnx", "image_decoder.onnx", "image_encoder.onnx"
    }  # fmt: skip
    change(engine_copy, lambda data: data.update(something_new={"a": 1}))
    assert read_manifest(engine_copy).model == manifest.model
    text, known = (engine_copy / "manifest.json").read_bytes(), read_manifest(engine_copy).hash
    (engine_copy / "manifest.json").write_bytes(b"\xef\xbb\xbf" + text)  # the mark that editors of Windows put before it
    assert read_manifest(engine_copy).hash == known


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(format="other"), "format is 'other'"),
        (lambda data: data.update(version=2), "newer"),
        (lambda data: data.update(version="1"), "version is '1'"),
        (lambda data: data.pop("model"), "model is None"),
        (lambda data: data["model"].update(grid=0), "grid is 0"),
        (lambda data: data["model"].update(grid=4097), "grid is 4097, expected an integer of 1 to 4096"),
        (
            lambda data: data["model"].update(num_classes=10**20, class_names=None),
            "expected an integer of 1 to 2147483647",
        ),
        (lambda data: data["model"].update(codes=True), "codes is True"),
        (lambda data: data["model"].update(class_names=["a"]), "class_names"),
        (lambda data: data["model"].update(image_size=None), "image_size is None, expected a number, as image_decoder.onnx is there"),
        (
            lambda data: [data["files"].pop("image_decoder.onnx"), data["model"].update(image_size=None)],
            "image_size is None, expected a number, as image_encoder.onnx is there",
        ),
        (lambda data: data["sampling"].update(steps=65), "steps is 65"),
        (lambda data: data["sampling"].update(cfg_scale=-1), "cfg_scale is -1"),
        (lambda data: data["sampling"].update(cfg_scale=10**400), "expected a number of 0 to 1e6"),
        (lambda data: data["sampling"].update(samp_temp=1000001), "samp_temp is 1000001, expected a number of 0 to 1e6"),
        (lambda data: data.update(source={"note": float("nan")}), r"not valid JSON \(NaN is no number\)"),
        (lambda data: data.update(float_type="bfloat16"), "float_type"),
        (lambda data: data["files"].pop("sampler.onnx"), "sampler.onnx"),
        (lambda data: data["files"]["sampler.onnx"].update(size=1), "expected 1"),
        (lambda data: data["files"]["sampler.onnx"].update(sha256="0" * 64), "altered"),
        (lambda data: data["files"].update({"../outside": {"size": 1, "sha256": ""}}), "inside the engine"),
        (lambda data: data["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}), "inside the engine"),
        (lambda data: data["files"].update({"a/../../b": {"size": 1, "sha256": ""}}), "inside the engine"),
        (lambda data: data["files"].update({"a//b": {"size": 1, "sha256": ""}}), "inside the engine"),
        (lambda data: data["files"].update({"a\\b": {"size": 1, "sha256": ""}}), "inside the engine"),
        (lambda data: data["files"].update({"a\0b": {"size": 1, "sha256": ""}}), "inside the engine"),
        (lambda data: data["files"].update({"x" * 300: {"size": 1, "sha256": ""}}), "missing"),
        (lambda data: data["files"].update({"\ud800": {"size": 1, "sha256": ""}}), "missing"),
        (lambda data: data["files"].update(gone={"size": 1, "sha256": ""}), "missing"),
    ],
)
def test_refusals(engine_copy: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    change(engine_copy, edit)
    with pytest.raises(EngineError, match=message) as caught:
        read_manifest(engine_copy)
    assert str(engine_copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_altered_truncated_and_foreign_files(engine_copy: Path, engines: Callable[[str], Path]) -> None:
    graph = engine_copy / "decoder.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1])
    with pytest.raises(EngineError, match=r"decoder\.onnx.*truncated"):
        read_manifest(engine_copy)
    graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(EngineError, match=r"decoder\.onnx.*altered"):
        read_manifest(engine_copy)
    graph.write_bytes((engines("odd") / "decoder.onnx").read_bytes())
    with pytest.raises(EngineError, match=r"decoder\.onnx"):
        read_manifest(engine_copy)
    graph.unlink()
    with pytest.raises(EngineError, match=r"decoder\.onnx: missing"):
        read_manifest(engine_copy)


def test_large_files_are_hashed_where_that_is_asked_for(engine_copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("enat.runtime.manifest.HASHED_AT_LOAD", 0)
    data = (engine_copy / "encoder.onnx").read_bytes()
    (engine_copy / "encoder.onnx").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    read_manifest(engine_copy)
    with pytest.raises(EngineError, match=r"encoder\.onnx: sha256"):
        Pipeline.load(engine_copy, verify=True)
    for asked in (["--info"], ["--class", 1, "--out", tmp_path / "a.png"]):
        refused(invoke(main, "--engine", engine_copy, "--verify", *asked), "encoder.onnx: sha256")


def test_a_link_out_of_the_engine(engine_copy: Path, tmp_path: Path) -> None:
    graph = engine_copy / "decoder.onnx"
    graph.rename(tmp_path / "elsewhere.onnx")
    graph.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(EngineError, match=r"leads out of the engine directory, to .*; cp -rL copies what links lead to$"):
        read_manifest(engine_copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "enat-engine"}', "\x00"])
def test_a_manifest_that_is_none(engine_copy: Path, text: str) -> None:
    (engine_copy / "manifest.json").write_text(text)
    with pytest.raises(EngineError, match=r"manifest\.json"):
        read_manifest(engine_copy)


def test_not_an_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such directory"):
        read_manifest(tmp_path / "none")
    with pytest.raises(EngineError, match=r"no manifest\.json"):
        read_manifest(tmp_path)


@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(engine_copy: Path, data: st.DataObject) -> None:
    """Whatever stands at any place of the manifest: an engine that can be read, or one clear error."""
    file = engine_copy / "manifest.json"
    original = file.read_text()
    manifest = json.loads(original)
    put_anything_anywhere(manifest, data, st.integers() | st.floats(allow_nan=False))
    file.write_text(json.dumps(manifest))
    try:
        read_manifest(engine_copy)
    except EnatError as error:
        assert "\n" not in str(error)
    finally:
        file.write_text(original)


def test_brackets_without_end(engine_copy: Path) -> None:
    (engine_copy / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(EngineError, match=r"manifest\.json: not valid JSON"):
        read_manifest(engine_copy)


def test_a_file_that_may_not_be_read(engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(EngineError, match=r"manifest\.json: .*[Pp]ermission"):
        read_manifest(engine_copy)


def test_the_files_of_a_graph(engine_copy: Path) -> None:
    """Those that its name begins, and those that might be any graph's."""
    for name in ("encoder.onnx.data", "weights.bin", "image_encoder.onnx_data"):
        (engine_copy / name).write_bytes(b"")
    manifest = read_manifest(list_anew(engine_copy))
    assert manifest.files_of("encoder") == ["encoder.onnx", "encoder.onnx.data", "weights.bin"]
    assert manifest.files_of("decoder") == ["decoder.onnx", "weights.bin"]
    assert manifest.files_of("image_encoder") == ["image_encoder.onnx", "image_encoder.onnx_data", "weights.bin"]
