"""What the C++ library and enat-run-cpp refuse."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import put_anything_anywhere
from cpp_library import GRAPHS, Edit, call, done, enat_run, engine_of, refused, rewritten, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from enat import EnatError, Pipeline
from enat.runtime.manifest import FILE, read_manifest
from enat.runtime.pipeline import BUNDLED_ENGINE


def nested(engine: Path) -> None:
    deep = "[" * 200_000 + "]" * 200_000
    file = engine / FILE
    file.write_text(file.read_text().replace('"precision": "fp32"', f'"precision": {deep}'))


def linked_out(engine: Path) -> None:
    graph = engine / "decoder.onnx"
    graph.rename(engine.parent / "elsewhere.onnx")
    graph.symlink_to(engine.parent / "elsewhere.onnx")


def made_a_folder(engine: Path) -> None:
    (engine / "decoder.onnx").unlink()
    (engine / "decoder.onnx").mkdir()


ENTRY = {"size": 1, "sha256": ""}
MALFORMED: dict[str, tuple[Edit | Callable[[Path], object], str]] = {
    "another format": (lambda data: data.update(format="other"), 'format is "other", expected "enat-engine"'),
    "no format": (lambda data: data.pop("format"), "format is missing"),
    "newer": (lambda data: data.update(version=2), "newer"),
    "much newer": (lambda data: data.update(version=2**64), "version is "),
    "a version in words": (lambda data: data.update(version="1"), 'version is "1"'),
    "no model": (lambda data: data.pop("model"), "model is missing"),
    "a model that is none": (lambda data: data.update(model=[1]), "model is an array of 1"),
    "no tokens": (lambda data: data["model"].update(grid=0), "grid is 0"),
    "more tokens than fit": (lambda data: data["model"].update(grid=2**40), "grid is 1099511627776"),
    "half a token": (lambda data: data["model"].update(grid=1.5), "grid is 1.5"),
    "codes that are true": (lambda data: data["model"].update(codes=True), "codes is true"),
    "a name too few": (lambda data: data["model"].update(class_names=["a"]), "class_names is an array of 1"),
    "names that are none": (lambda data: data["model"].update(class_names=[{}] * 36), "class_names"),
    "too many steps": (lambda data: data["sampling"].update(steps=65), "steps is 65"),
    "a negative guidance": (lambda data: data["sampling"].update(cfg_scale=-1), "cfg_scale is -1"),
    "an endless guidance": (lambda data: data["sampling"].update(cfg_scale=float("inf")), "not valid JSON"),
    "a huge guidance": (lambda data: data["sampling"].update(cfg_scale=10**400), "not valid JSON"),
    "another type": (lambda data: data.update(float_type="bfloat16"), 'float_type is "bfloat16"'),
    "a long type": (lambda data: data.update(float_type="x" * 1000), "x…, expected float32"),
    "a source that is none": (lambda data: data.update(source=1), "source is 1"),
    "builds that are none": (lambda data: data.update(builds={}), "builds is an empty object"),
    "no bits": (lambda data: data.update(calibration={"weight_bits": 0}), "weight_bits is 0"),
    "no sampler": (lambda data: data["files"].pop("sampler.onnx"), "sampler.onnx among them"),
    "an entry that is none": (lambda data: data["files"].update({"sampler.onnx": 1}), 'files["sampler.onnx"] is 1'),
    "another size": (lambda data: data["files"]["sampler.onnx"].update(size=1), "sampler.onnx: 12 bytes, expected 1:"),
    "another hash": (lambda data: data["files"]["sampler.onnx"].update(sha256="0" * 64), "sampler.onnx: sha256 "),
    "a parent": (lambda data: data["files"].update({"../outside": ENTRY}), "inside the engine"),
    "an absolute path": (lambda data: data["files"].update({"/etc/passwd": ENTRY}), "inside the engine"),
    "a way round": (lambda data: data["files"].update({"a/../../b": ENTRY}), "inside the engine"),
    "no name": (lambda data: data["files"].update({"": ENTRY}), "inside the engine"),
    "the folder": (lambda data: data["files"].update({".": ENTRY}), "inside the engine"),
    "a backslash": (lambda data: data["files"].update({"a\\b": ENTRY}), "inside the engine"),
    "a file as a folder": (lambda data: data["files"].update({"sampler.onnx/": ENTRY}), "inside the engine"),
    "a way of no length": (lambda data: data["files"].update({"./sampler.onnx": ENTRY}), "inside the engine"),
    "a zero": (lambda data: data["files"].update({"a\0b": ENTRY}), "inside the engine"),
    "a long name": (lambda data: data["files"].update({"x" * 300: ENTRY}), "missing"),
    "two lines": (lambda data: data["files"].update({"a\nb": ENTRY}), "a?b: missing"),
    "no character": (lambda data: data["files"].update({"\ud800": ENTRY}), "not valid JSON"),
    "a file that is gone": (lambda data: data["files"].update(gone=ENTRY), "gone: missing; the manifest lists it with 1 bytes"),
    "nested": (nested, "precision is an array of 1, expected a string"),
    "an end too early": (lambda engine: os.truncate(engine / FILE, 300), "not valid JSON"),
    "nothing": (lambda engine: os.truncate(engine / FILE, 0), "not valid JSON"),
    "more after the end": (lambda engine: (engine / FILE).write_bytes((engine / FILE).read_bytes() + b"\0{"), "it has a zero"),
    "UTF-16": (lambda engine: (engine / FILE).write_text((engine / FILE).read_text(), encoding="utf-16"), "not valid JSON"),
    "Latin-1": (lambda engine: (engine / FILE).write_bytes(b'{"format": "\xe9"}'), "not valid JSON"),
    "a list": (lambda engine: (engine / FILE).write_text("[]"), "the manifest is an array of 0"),
    "bytes": (lambda engine: (engine / FILE).write_bytes(np.random.default_rng(0).bytes(999)), "not valid JSON"),
    "brackets": (lambda engine: (engine / FILE).write_text("[" * 500_000), "not valid JSON"),
    "no manifest": (lambda engine: (engine / FILE).unlink(), "it has no manifest.json"),
    "no engine": (shutil.rmtree, "no such directory"),
    "a link out": (linked_out, "decoder.onnx: leads out of the engine directory"),
    "a folder for a file": (made_a_folder, "decoder.onnx: missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_manifests(built: Path, tmp_path: Path, name: str) -> None:
    edit, message = MALFORMED[name]
    on_data = edit.__code__.co_varnames[:1] == ("data",) if hasattr(edit, "__code__") else False
    engine = engine_of(tmp_path / "engine", edit if on_data else lambda data: None)  # type: ignore[arg-type]
    if not on_data:
        edit(engine)  # type: ignore[arg-type]
    refused(enat_run(built, "--class", 0, "--out", tmp_path / "x.png", engine=engine), engine, message)


@pytest.fixture(scope="module")
def reader(plain: Path) -> Iterator[Callable[[Path], str]]:
    """Asks one process about one engine after the other."""
    with subprocess.Popen([plain / "tests" / "read-manifests"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout

        def read(engine: Path) -> str:
            process.stdin.write(f"{engine}\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            return process.stdout.readline().rstrip("\n")  # type: ignore[union-attr]

        yield read
        process.stdin.close()


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_python_refuses_is_refused(reader: Callable[[Path], str], tmp_path: Path, data: st.DataObject) -> None:
    """Whatever stands at any place of the manifest: both read the engine, or both refuse it."""
    engine = tmp_path / "engine"
    if not engine.exists():
        engine_of(engine)
        assert reader(engine) == "ok"
    rewritten(engine)
    manifest = json.loads((engine / FILE).read_text())
    put_anything_anywhere(manifest, data, st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False))
    (engine / FILE).write_text(json.dumps(manifest))
    try:
        read_manifest(engine)
        expected = "ok"
    except EnatError:
        expected = str(engine)
    answer = reader(engine)
    assert answer.startswith(expected), answer


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_that_are_damaged(built: Path, tmp_path: Path, graph: str) -> None:
    """In files whose size and hash are as the manifest says."""
    engine = engine_of(tmp_path / "engine", graphs=True)
    file = engine / graph
    whole = file.read_bytes()
    noise = np.random.default_rng(1).bytes(1000)
    for damaged in (b"", whole[:1], whole[:1000], whole[: len(whole) // 2], whole[:-1], noise):
        file.write_bytes(damaged)
        result = enat_run(built, "--class", 0, "--out", tmp_path / "x.png", engine=rewritten(engine))
        refused(result, file, codes=(1, 2))
    for start in range(0, len(whole), len(whole) // 5):  # in the middle it may be weights that are lost, and other pictures
        file.write_bytes(whole[:start] + noise + whole[start + len(noise) :])
        result = enat_run(built, "--class", 0, "--seed", 0, "--out", tmp_path / "x.png", engine=rewritten(engine))
        if result.returncode:
            refused(result, engine, codes=(1, 2))
    file.write_bytes(whole[:-1])
    (engine / FILE).write_bytes((BUNDLED_ENGINE / FILE).read_bytes())
    refused(enat_run(built, "--class", 0, "--out", "x.png", engine=engine), f"{file}: {len(whole) - 1} bytes, expected {len(whole)}")
    file.write_bytes((BUNDLED_ENGINE / GRAPHS[GRAPHS.index(graph) - 1]).read_bytes())
    refused(enat_run(built, "--class", 0, "--out", "x.png", engine=rewritten(engine)), f"{file}: it has no ")


def altered(engine: Path, graph: str, output: str, kind: str, inputs: list[str], options: dict[str, Any]) -> None:
    """Sends a graph's output through one more operator, whose result takes its name."""
    model = onnx.load(engine / graph)
    for node in model.graph.node:
        node.output[:] = ["honest" if name == output else name for name in node.output]
        node.input[:] = ["honest" if name == output else name for name in node.input]
    vectors = {name: np.array([value]) for name, value in {"zero": 0, "one": 1, "two": 2, "all": 1000}.items()}
    constants = {"thousand": np.array(1000), **vectors}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    model.graph.node.append(onnx.helper.make_node(kind, inputs, [output], **options))
    for info in model.graph.output:
        if info.name == output:
            info.type.tensor_type.ClearField("shape")
    onnx.save(model, engine / graph)


LIES: dict[str, tuple[str, str, tuple[str, list[str], dict[str, Any]], str]] = {
    "positions beyond the last": ("sampler", "revealed_positions", ("Add", ["honest", "thousand"], {}), "it gave the position 10"),
    "positions before the first": ("sampler", "revealed_positions", ("Sub", ["honest", "thousand"], {}), "it gave the position -"),
    "tokens too many": ("sampler", "revealed_tokens", ("Concat", ["honest", "honest"], {"axis": 1}), "it gave revealed_tokens of"),
    "masked ones too many": ("sampler", "masked_positions", ("Concat", ["honest", "honest"], {"axis": 1}), "it gave masked_positions of"),
    "tokens beyond the last": ("sampler", "revealed_tokens", ("Add", ["honest", "thousand"], {}), "it gave the token 1"),
    "choices too many": ("sampler", "tokens", ("Concat", ["honest", "honest"], {"axis": 1}), "it gave tokens of shape [1, 128]"),
    "a visible token too few": ("encoder", "visible_features", ("Slice", ["honest", "one", "all", "one"], {}), "gave visible_features of"),
    "visible tokens too many": ("encoder", "visible_features", ("Concat", ["honest", "honest"], {"axis": 1}), "gave visible_features of"),
    "features too wide": ("encoder", "visible_features", ("Concat", ["honest", "honest"], {"axis": 2}), "it gave visible_features of"),
    "logits of more pictures": ("decoder", "logits", ("Concat", ["honest", "honest"], {"axis": 0}), "it gave logits of shape [2, 64, 512]"),
    "logits of fewer codes": ("decoder", "logits", ("Slice", ["honest", "zero", "one", "two"], {}), "it gave logits of shape [1, 64, 1]"),
    "rows too few": ("condition", "decoder_modulation", ("Slice", ["honest", "zero", "one"], {}), "it gave decoder_modulation of shape"),
    "pictures in a row": ("image_decoder", "images", ("Flatten", ["honest"], {}), "it gave images of shape [1, 12288]"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_graphs_that_break_the_contract(built: Path, tmp_path: Path, lie: str) -> None:
    graph, output, node, message = LIES[lie]
    engine = engine_of(tmp_path / "engine", graphs=True)
    altered(engine, f"{graph}.onnx", output, *node)
    refused(enat_run(built, "--class", 0, "--out", tmp_path / "x.png", engine=rewritten(engine)), f"{graph}.onnx: ", message)


def test_an_engine_without_pictures(plain: Path, bundled: Pipeline, tmp_path: Path) -> None:
    engine = engine_of(tmp_path / "engine", graphs=True)
    (engine / "image_decoder.onnx").unlink()
    rewritten(engine)
    refused(enat_run(plain, "--class", 0, "--out", tmp_path / "x.png", engine=engine), engine, "no image decoder")
    assert np.array_equal(tokens_of(plain, tmp_path, "--class", "A", "--seed", 1, engine=engine), bundled.generate_tokens(["A"], seed=1))


@pytest.mark.parametrize("name", ["x.png", "x.npy"])
def test_a_full_disk_leaves_the_file_that_was_there(plain: Path, tmp_path: Path, name: str) -> None:
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    (tmp_path / name).write_text("earlier")
    full = enat_run(plain, "--class", "1", "--out", tmp_path / name, preexec_fn=small_files)
    refused(full, f"{tmp_path / name}: cannot be written: File too large", codes=(1,))
    assert (tmp_path / name).read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "folder.png").mkdir()
    refused(enat_run(plain, "--class", "1", "--out", tmp_path / "folder.png"), "is a folder; expected a file to write")


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--out", "x.png"], "at least one class", 2),
        (["--class", "1"], "expected --out", 2),
        (["--class", "1", "--out", "x.jpg"], "ends in .png or .npy", 2),
        (["--class", "1", "--out"], "expected a value after --out", 2),
        (["--size", "1"], "unknown argument '--size'", 2),
        (["--size=1"], "unknown argument '--size=1'", 2),
        (["--seed=-1"], "expected a number for --seed, got '-1'", 2),
        (["--seed", "-1"], "expected a number for --seed, got '-1'", 2),
        (["--seed", "18446744073709551616"], "--seed", 2),
        (["--steps", "-99999999999999999999"], "--steps: -99999999999999999999 is too small a number", 2),
        (["--guidance", "x"], "expected a number for --guidance, got 'x'", 2),
        (["--class", "1", "--out", "x.png", "--guidance", "-1e-9"], "guidance of 0 to 1e6, got -1e-09", 2),
        (
            ["--class", "all", "--num", "500", "--columns", "1", "--out", "x.png"],
            "would have 64×1187998 pixels; expected at most 1000000",
            2,
        ),
        (["--class", "1", "--engine", "", "--out", "x.png"], "expected --engine", 2),
        (["--steps", "8.5"], "expected a number for --steps, got '8.5'", 2),
        (["--class", "1", "--out", "x.png", "--steps", "65"], "expected 1 to 64 steps, got 65", 2),
        (["--class", "1", "--out", "x.png", "--guidance", "nan"], "guidance of 0 to 1e6", 2),
        (["--class", "1", "--out", "x.png", "--mask-temperature", "-0.5"], "mask temperature of 0 to 1e6", 2),
        (["--class", "1", "--out", "x.png", "--sampling-temperature", "inf"], "sampling temperature of 0 to 1e6", 2),
        (["--class", "1", "--out", "x.png", "--num", "0"], "1 or more images a class", 2),
        (
            ["--class", "1", "--class", "2", "--out", "x.npy", "--num", "2000000000"],
            "2 classes of 2000000000 pictures are too many for one",
            2,
        ),
        (["--class", "1", "--out", "x.png", "--batch-size", "0"], "batch size of 1 or more", 2),
        (["--class", "1", "--out", "x.png", "--columns", "0"], "1 or more for --columns", 2),
        (["--class", "1", "--out", "x.png", "--threads", "0"], "1 or more for --threads", 2),
        (["--class", "1", "--out", "x.png", "--device", "gpu"], "unknown device 'gpu'", 2),
        (["--class", "1", "--out", "x.png", "--device", "cuda:x"], "unknown device 'cuda:x'", 2),
        (["--class", "1", "--out", "x.png", "--provider", "rocm"], "unknown provider 'rocm'", 2),
        (["--class", "1", "--out", "x.png", "--device", "cuda", "--provider", "cpu"], "got the device cuda", 2),
        (["--class", "1", "--out", "x.png", "--device", "cuda:0"], "cannot use cuda:0 (cuda)", 1),
        (["--class", "1", "--out", "x.png", "--device", "cuda:0", "--provider", "tensorrt"], "cannot use cuda:0 (tensorrt)", 1),
        (["--class", "1", "--out", "x" * 300 + ".png"], "x.png: cannot be written: File name too long", 2),
        (["--class", "1", "--out", "/nowhere/x.png"], "/nowhere/x.png: cannot be written: No such file", 2),
        (["--class", "1", "--out", "/nowhere/x.npy", "--seed", "1"], "/nowhere/x.npy: cannot be written: No such file", 2),
    ],
)
def test_wrong_arguments(built: Path, arguments: list[str], message: str, code: int) -> None:
    refused(enat_run(built, *arguments), message, codes=(code,))


def test_the_tensorrt_of_onnxruntime_runs_no_8_bit_engines(plain: Path, tmp_path: Path) -> None:
    engine = engine_of(tmp_path / "engine", lambda data: data.update(precision="int8", calibration={"weight_bits": 8}), graphs=True)
    arguments = ("--class", "1", "--out", "x.png", "--device", "cuda:0", "--provider", "tensorrt")
    refused(enat_run(plain, *arguments, engine=engine), "the provider tensorrt runs no int8 engines", codes=(2,))


def test_no_engine(plain: Path) -> None:
    refused(call(plain / "enat-run-cpp", "--class", "1", "--out", "x.png"), "expected --engine")
    assert "usage: enat-run-cpp" in done(plain / "enat-run-cpp", "-h")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("option", ["-h", "--list-classes"])
def test_an_answer_that_cannot_be_written(plain: Path, option: str) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [plain / "enat-run-cpp", f"--engine={BUNDLED_ENGINE}", option], stdout=full, stderr=subprocess.PIPE, text=True
        )
    refused(result, "stdout cannot be written: No space left", codes=(1,))
