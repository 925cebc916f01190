"""Engines in float16 and 8 bits: their graphs, their quality, and the commands that make and compare them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import Result
from conftest import invoke, list_anew, read_golden, refused, with_initializers

from enat import Pipeline
from enat.calibration.calibrate import Settings
from enat.calibration.products import Graphs, load_graphs
from enat.calibration.smooth import ALPHA
from enat.errors import EngineError, ExportError, InputError
from enat.export import convert
from enat.export.cli import main as export_main
from enat.export.compare import compare
from enat.export.convert import Precision, convert_engine
from enat.export.directory import write_manifest
from enat.export.precision import out_of_range, to_float16
from enat.export.tables import int8_probe
from enat.graph_file import load, save
from enat.runtime.backends import onnxruntime_cpu
from enat.runtime.backends.int8_kernels import PROBE
from enat.runtime.manifest import FILE, Manifest, read_manifest
from enat.runtime.pipeline import BUNDLED_ENGINE

NETWORK_FILES = ("condition.onnx", "encoder.onnx", "decoder.onnx", "image_decoder.onnx")


# Quality, on the bundled engine, which is trained


@pytest.mark.parametrize(
    ("name", "images", "divergence", "top1", "psnr"),
    [("fp16", 36, 1e-5, 0.995, 55), ("int8", 144, 0.01, 0.97, 37), ("int8_fp16", 72, 0.01, 0.97, 37)],
)
def test_quality(
    name: str, images: int, divergence: float, top1: float, psnr: float, bundled: Pipeline, request: pytest.FixtureRequest
) -> None:
    with Pipeline.load(request.getfixturevalue(name)) as engine:
        found = compare(engine, bundled, images=images, seed=31337)
    assert found.divergence <= divergence
    assert found.top1 >= top1
    assert found.psnr is not None and found.psnr >= psnr
    assert found.share["all"] >= 0.9 if "int8" in name else found.share["all"] == 0


# Graphs


def test_types_in_float16(fp16: Path) -> None:
    manifest = read_manifest(fp16)
    assert (manifest.precision, manifest.float_type) == ("fp16", "float16")
    half, full = ir.DataType.FLOAT16, ir.DataType.FLOAT
    for name, model in load_graphs(manifest).items():
        for value in (*model.graph.inputs, *model.graph.outputs):
            assert value.dtype not in (half, full) or (value.dtype == full) == (value.name == "logits"), (name, value.name)
        for node in model.graph:
            inputs = [value.dtype for value in node.inputs if value is not None and value.dtype in (half, full)]
            if node.op_type in ("LayerNormalization", "InstanceNormalization", "Softmax"):
                assert set(inputs) == {full}, (name, node.name)
            elif node.op_type in ("MatMul", "Conv", "Gelu"):
                assert set(inputs) == {half}, (name, node.name)


@pytest.mark.parametrize("name", ["fp16", "int8", "int8_fp16"])
def test_graphs_are_valid_and_keep_the_contract(name: str, request: pytest.FixtureRequest) -> None:
    engine = request.getfixturevalue(name)
    float_type = np.dtype(read_manifest(engine).float_type)
    for file in NETWORK_FILES:
        onnx.checker.check_model(str(engine / file), full_check=True)
        found, expected = (onnx.load(folder / file) for folder in (engine, BUNDLED_ENGINE))
        assert (found.opset_import, found.ir_version) == (expected.opset_import, expected.ir_version)
        assert {node.domain for node in found.graph.node} == {""}
        for ours, theirs in zip((*found.graph.input, *found.graph.output), (*expected.graph.input, *expected.graph.output), strict=True):
            assert ours.name == theirs.name
            assert ours.type.tensor_type.shape == theirs.type.tensor_type.shape
            kind = theirs.type.tensor_type.elem_type
            wanted = kind if kind != onnx.TensorProto.FLOAT or ours.name == "logits" else onnx.helper.np_dtype_to_tensor_dtype(float_type)
            assert ours.type.tensor_type.elem_type == wanted, ours.name
    assert (engine / "sampler.onnx").read_bytes() == (BUNDLED_ENGINE / "sampler.onnx").read_bytes()


@pytest.mark.parametrize("name", ["fp16", "int8", "int8_fp16"])
def test_the_runtime_draws_as_ever(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Any number of steps, empty dimensions, and the batch does not matter."""
    with Pipeline.load(request.getfixturevalue(name)) as pipe:
        for steps, guidance in ((1, 0.0), (8, 4.0), (64, 2.0)):
            together = pipe.generate_tokens([3, 14, 15], seed=5, steps=steps, guidance=guidance)
            apart = pipe.generate_tokens([3, 14, 15], seed=5, steps=steps, guidance=guidance, batch_size=1)
            assert np.array_equal(together, apart), (steps, guidance)


@pytest.mark.parametrize("case", ["tiny", "odd"])
def test_float16_of_the_golden_cases(case: str, engines: Callable[[str], Path], tmp_path: Path) -> None:
    compared = convert_engine(engines(case), tmp_path / "fp16", Precision("fp16"), Settings(seed=5))
    assert compared.seed == 2**32 + 5  # other pictures than those that it learned from
    with Pipeline.load(tmp_path / "fp16") as engine, Pipeline.load(engines(case)) as reference:
        found = compare(engine, reference, images=8)
    assert found.divergence < 1e-4
    assert found.step_features.max() < 5e-3


def exploding(engine: Path, layer: str, factor: float, back: str | None) -> None:
    """Makes a layer's output larger, and where it is used as much smaller again."""
    graphs = load_graphs(read_manifest(engine), ("encoder",))
    constants = graphs["encoder"].graph.initializers
    changed = {}
    for name, scale in ((f"{layer}.weight", factor), (f"{layer}.bias", factor), *([(f"{back}.weight", 1 / factor)] if back else [])):
        if name not in constants:  # nothing is added to a context's values
            continue
        tensor = constants[name].const_value
        assert tensor is not None
        changed[name] = tensor.numpy() * np.float32(scale)
    save(with_initializers(graphs["encoder"], changed), engine / "encoder.onnx")
    list_anew(engine)


def test_what_overflows_stays_float32(engine_copy: Path, tmp_path: Path) -> None:
    """Values beyond 65504 inside an attention: seen, kept in float32, and the engine is as good as ever; so with int8 in front."""
    exploding(engine_copy, "blocks.1.attn.own_value", 1e6, None)
    exploding(engine_copy, "blocks.1.attn.context_value", 1e6, "blocks.1.attn.proj")
    naive = to_float16(load_graphs(read_manifest(engine_copy))["encoder"])
    comparison = convert_engine(engine_copy, tmp_path / "fp16", Precision("fp16"))
    assert comparison.divergence < 1e-4
    content = json.loads((tmp_path / "fp16" / FILE).read_text())
    assert content["calibration"]["largest_value"] > 65504
    assert content["calibration"]["float32_values"]["encoder"]
    settings = Settings(images=16, smoothquant=0, float_layers=())
    in_float32, in_float16 = (
        convert_engine(engine_copy, tmp_path / f"int8-{kind}", Precision("int8", kind), settings) for kind in ("fp32", "fp16")
    )
    assert in_float16.divergence < 1.2 * in_float32.divergence
    # Without looking, it would have been infinite.
    manifest = read_manifest(tmp_path / "fp16")
    save(naive, tmp_path / "fp16" / "encoder.onnx")
    write_manifest(tmp_path / "fp16", content)
    assert manifest.float_type == "float16"
    with (
        pytest.raises(ExportError, match="not finite"),
        Pipeline.load(tmp_path / "fp16") as broken,
        Pipeline.load(engine_copy) as reference,
    ):
        compare(broken, reference, images=4)


def test_a_broken_float32_engine(engine_copy: Path, tmp_path: Path) -> None:
    model, name = load_graphs(read_manifest(engine_copy), ("image_decoder",))["image_decoder"], "decoder.conv_in.weight"
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    values = tensor.numpy().copy()
    values[0, 0, 0, 0] = np.nan
    save(with_initializers(model, {name: values}), engine_copy / "image_decoder.onnx")
    list_anew(engine_copy)
    with pytest.raises(ExportError, match=r"image_decoder\.onnx: .* not finite: the float32 engine itself is broken"):
        convert_engine(engine_copy, tmp_path / "int8", Precision("int8"), Settings(images=8, float_layers=()))


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [("WORST_DIVERGENCE", 0.0, "nats: it would draw something else"), ("WORST_PSNR", 99.0, "dB from float32's: something else")],
    ids=["tokens", "pictures"],
)
def test_an_engine_that_draws_something_else_is_not_put_in_place(
    engines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: float, message: str
) -> None:
    monkeypatch.setattr(convert, limit, value)
    with pytest.raises(ExportError, match=message):
        convert_engine(engines("tiny"), tmp_path / "fp16", Precision("fp16"))
    assert list(tmp_path.iterdir()) == []


def test_float16_is_chosen_by_what_smoothing_made(engines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of the smoothed graphs are watched, as those are quantized."""

    class Watched(Exception):
        pass

    def watched(manifest: Manifest, graphs: Graphs, *rest: object) -> None:
        raise Watched(graphs)

    monkeypatch.setattr(convert, "magnitudes", watched)
    with pytest.raises(Watched) as seen:
        convert_engine(engines("tiny"), tmp_path / "x", Precision("int8", "fp16"), Settings(images=8, float_layers=()))
    tables = [
        graphs["condition"].graph.initializers["encoder_modulation_table"].const_value.numpy()
        for graphs in (seen.value.args[0], load_graphs(read_manifest(engines("tiny"))))
    ]
    assert not np.array_equal(*tables)


def test_features_that_overflow_are_refused(engine_copy: Path, tmp_path: Path) -> None:
    exploding(engine_copy, "prev_proj.mlp.fc2", 1e8, None)
    result = invoke(export_main, "--engine", engine_copy, "--precision", "fp16", "--out", tmp_path / "fp16")
    refused(result, "features reaches", "too much for float16", code=1)
    assert not (tmp_path / "fp16").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_features_that_overflow_with_other_settings_are_refused(engine_copy: Path, tmp_path: Path) -> None:
    """Those that one step without guidance, the engine's own, does not reach."""
    exploding(engine_copy, "prev_proj.mlp.fc2", 1e8, None)
    content = json.loads((engine_copy / FILE).read_text())
    content["sampling"] |= {"steps": 1, "cfg_scale": 0}
    write_manifest(engine_copy, content)
    refused(invoke(export_main, "--engine", engine_copy, "--precision", "fp16", "--out", tmp_path / "fp16"), "too much for float16", code=1)


def test_a_damaged_engine_gets_no_new_hashes(engine_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file whose size alone is looked at when an engine is loaded."""
    monkeypatch.setattr("enat.runtime.manifest.HASHED_AT_LOAD", 1000)
    file = engine_copy / "decoder.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    read_manifest(engine_copy)
    result = invoke(export_main, "--engine", engine_copy, "--precision", "fp16", "--out", tmp_path / "fp16")
    refused(result, f"{file}: sha256 ", "the file was altered")


def test_a_class_whose_modulation_overflows_is_found(engine_copy: Path, tmp_path: Path) -> None:
    """Among many classes that no picture of the calibration was of."""
    model = load_graphs(read_manifest(engine_copy), ("condition",))["condition"]
    table = model.graph.initializers["decoder_modulation_table"].const_value
    assert table is not None
    values = table.numpy().copy()
    values[9] *= 1e6
    save(with_initializers(model, {"decoder_modulation_table": values}), engine_copy / "condition.onnx")
    list_anew(engine_copy)
    settings = Settings(classes=("0-3",), images=8)
    with pytest.raises(ExportError, match=r"decoder_modulation reaches .*, too much for float16"):
        convert_engine(engine_copy, tmp_path / "fp16", Precision("fp16"), settings)


def test_ranges_of_float16() -> None:
    assert not out_of_range(0) and not out_of_range(1e-3) and not out_of_range(1e4)
    assert out_of_range(65504) and out_of_range(1e-6) and out_of_range(float("inf"))


def held_in_float16(graph: str, **constants: np.ndarray) -> dict[str, np.ndarray]:
    """The constants of a graph in float16."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {graph}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(one, name) for name, one in constants.items())
    narrow = ir.to_proto(to_float16(ir.from_proto(onnx.shape_inference.infer_shapes(model))))
    return {one.name: onnx.numpy_helper.to_array(one) for one in narrow.graph.initializer}


PRODUCT = """(float[n, 4] x) => (float[n, 3] logits) {
  w = DequantizeLinear<axis = 1>(levels, scales)
  y = MatMul(x, w)
  logits = Identity(y)
}"""
CONVOLUTION = """(float[n, 4, 5, 5] x) => (float[n, 3, 5, 5] images) {
  w = DequantizeLinear<axis = 0>(levels, scales)
  y = Conv(x, w)
  images = Identity(y)
}"""


@pytest.mark.parametrize("graph", [PRODUCT, CONVOLUTION], ids=["product", "convolution"])
def test_channels_that_are_next_to_nothing(graph: str) -> None:
    """float16 holds no scale for them; levels of another scale are as near."""
    levels = np.array([[127, 127, -127], [-50, 60, 1], [0, 2, 3], [4, 5, 6]], np.int8)
    scales = np.array([0.01, 1e-12, 3e-7], np.float32)
    held = held_in_float16(graph, levels=levels if graph is PRODUCT else levels.T[..., None, None], scales=scales)
    found = held["levels"] if graph is PRODUCT else held["levels"][..., 0, 0].T
    assert held["scales"].dtype == np.float16 and held["scales"].min() > 0
    error = found * held["scales"].astype(np.float32) - levels * scales
    assert (np.abs(error).max(0) <= [0.01 * 127 * 2**-11, 5e-7, 5e-7]).all()
    assert np.array_equal(found[:, 0], levels[:, 0])


def test_weights_that_float16_does_not_hold() -> None:
    """They stay float32: those of floats, and those that levels and scales make together."""
    held = held_in_float16(PRODUCT, levels=np.full((4, 3), 100, np.int8), scales=np.full(3, 1000, np.float32))
    assert held["scales"].dtype == np.float32
    held = held_in_float16("(float[n, 2] x) => (float[n, 2] y) { y = MatMul(x, w) }", w=np.full((2, 2), 1e5, np.float32))
    assert np.array_equal(held["w"], np.full((2, 2), 1e5, np.float32))


def test_weights_of_7_bits(int7: Path, bundled: Pipeline) -> None:
    manifest = read_manifest(int7)
    assert manifest.weight_bits == 7
    for model in load_graphs(manifest).values():
        for name, value in model.graph.initializers.items():
            assert value.const_value is not None
            if name.endswith(".weight_int8"):
                assert np.abs(value.const_value.numpy().astype(int)).max() == 63
    with Pipeline.load(int7) as pipe:
        assert compare(pipe, bundled, images=36).divergence < 0.01


def test_sizes(fp16: Path, int8: Path) -> None:
    def size(engine: Path) -> int:
        return sum((engine / name).stat().st_size for name in NETWORK_FILES)

    assert size(fp16) < 0.52 * size(BUNDLED_ENGINE)
    assert size(int8) < 0.35 * size(BUNDLED_ENGINE)


def test_the_manifest_says_how(int8: Path) -> None:
    content = json.loads((int8 / FILE).read_text())
    assert content["precision"] == "int8" and content["float_type"] == "float32"
    section = content["calibration"]
    assert (section["method"], section["images"], section["weight_bits"], section["modulation"]) == ("percentile", 64, 8, "int8")
    assert section["int8_share"] >= 0.9
    worst = max(section["harm"], key=lambda name: section["harm"][name] * (not name.startswith("decoder.")))
    assert worst in section["float_layers"]
    assert section["compared"]["top1"] > 0.96
    assert content["source"] == json.loads((BUNDLED_ENGINE / FILE).read_text())["source"]


# Kernels that saturate


def test_the_probe_is_what_its_source_says(tmp_path: Path) -> None:
    save(int8_probe(), tmp_path / "probe.onnx")
    assert (tmp_path / "probe.onnx").read_bytes() == PROBE.read_bytes()


def test_the_probe_tells_kernels_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """True to the CPU's flags where they can be read; and a result that lost sums is seen."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if "avx2" in flags:
        assert onnxruntime_cpu.int8_saturates() == (not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags))

    class Saturated(onnxruntime_cpu.ort.InferenceSession):  # type: ignore[misc]
        def run(self, *arguments: object) -> list[np.ndarray]:
            return [np.full((1, 16), 8160, np.float32)]  # what a CPU without VNNI gives

    monkeypatch.setattr(onnxruntime_cpu.ort, "InferenceSession", Saturated)
    assert onnxruntime_cpu.int8_saturates.__wrapped__()


@pytest.mark.parametrize("name", ["int8", "int8_fp16"])
def test_kernels_that_saturate(name: str, int7: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower kernels with the same results and a warning; none for an engine of 7 bits, nor for float."""
    engine = request.getfixturevalue(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where this CPU has no others
        with Pipeline.load(engine) as pipe:
            expected = pipe.generate_tokens(range(36), seed=3)
    monkeypatch.setattr(onnxruntime_cpu, "int8_saturates", lambda: True)
    with pytest.warns(RuntimeWarning, match="--weight-bits 7"), Pipeline.load(engine) as pipe:
        options = pipe.backend.sessions.options  # type: ignore[attr-defined]
        assert options.get_session_config_entry(onnxruntime_cpu.exact_products(pipe.manifest)) == "1"
        assert np.array_equal(pipe.generate_tokens(range(36), seed=3), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pipeline.load().close()
        Pipeline.load(int7).close()


# What is refused


def test_wrong_arguments_of_enat_export(int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*options: object) -> Result:
        return invoke(export_main, "--engine", BUNDLED_ENGINE, "--out", tmp_path / "out", *options)

    refused(invoke(export_main, "--out", tmp_path / "out"), "either --ckpt or --engine")
    refused(export(), "expected --precision fp16 or int8")
    refused(export("--precision", "fp16", "--heads", 3), "--heads goes with --ckpt")
    refused(export("--precision", "fp16", "--steps", 4), "--steps goes with --ckpt or --tensorrt; an engine brings its own")
    refused(export("--precision", "fp16", "--calibration-images", 9), "--calibration-images goes with --precision int8")
    refused(export("--precision", "fp16", "--float-type", "fp16"), "--float-type goes with --precision int8")
    refused(export("--precision", "int8", "--calibration-images", 3), "3 calibration images are too few; expected at least 8")
    refused(export("--precision", "int8", "--calibration-classes", "A-Z", "--calibration-images", 8), "8 images are too few for 26")
    refused(export("--precision", "int8", "--calibration-classes", "36"), "expected a class of 0 to 35, got 36")
    refused(export("--precision", "int8", "--calibration-classes", "AA"), "unknown class 'AA'")
    refused(export("--precision", "int8", "--calibration-images", 8, "--float-layers", "nonsense"), "no layer is called 'nonsense'")
    refused(export("--precision", "int8", "--calibration", BUNDLED_ENGINE / FILE), "not a calibration")
    refused(export("--precision", "int8", "--calibration", tmp_path / "out" / "c.npz"), "expected a place outside")
    shared = tmp_path.with_name("shared")  # a calibration that others made
    shared.mkdir()
    (shared / "c.npz").write_bytes(b"")
    with monkeypatch.context() as changed:
        changed.setattr("os.access", lambda path, mode: not (mode & os.W_OK and Path(path).is_relative_to(shared)))
        refused(export("--precision", "int8", "--calibration", shared / "c.npz"), "c.npz: not a calibration")
        refused(export("--precision", "int8", "--calibration", shared / "d.npz"), "d.npz: cannot be written: no permission")
    refused(export("--precision", "int8", "--calibration-seed", -5), "expected a seed of 0")
    refused(export("--precision", "int8", "--float-layers", ""), "--float-layers: expected words with commas between")
    refused(invoke(export_main, "--engine", int8, "--precision", "fp16", "--out", tmp_path / "out"), "its precision is int8, expected fp32")
    refused(invoke(export_main, "--engine", tmp_path / "no", "--precision", "fp16", "--out", tmp_path / "out"), "not an engine directory")
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_of_another_engine(int8: Path, engines: Callable[[str], Path], tmp_path: Path) -> None:
    calibration = int8.parent / "calibration.npz"
    result = invoke(
        export_main, "--engine", engines("tiny"), "--precision", "int8", "--calibration", calibration, "--out", tmp_path / "out"
    )
    refused(result, "calibration of another engine")


def test_settings_that_contradict_a_calibration(int8: Path, tmp_path: Path) -> None:
    calibration = int8.parent / "calibration.npz"
    result = invoke(
        export_main, "--engine", BUNDLED_ENGINE, "--precision", "int8", "--calibration", calibration, "--out", tmp_path / "out",
        "--calibration-method", "minmax",
    )  # fmt: skip
    refused(result, "made with the method percentile, asked for minmax")


def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("onnx_ir", "enat.calibration", "enat.export.convert"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    result = invoke(export_main, "--engine", BUNDLED_ENGINE, "--precision", "int8", "--out", tmp_path / "out")
    refused(result, "--precision int8 needs", 'pip install "enat[calibration]"', code=1)


def test_precision_in_one_go_with_a_checkpoint(tmp_path: Path, smallest: tuple[object, ...]) -> None:
    result = invoke(
        export_main, *smallest, "--vqgan", read_golden("tiny").vqgan, "--no-image-encoder", "--precision", "int8",
        "--float-type", "fp16", "--calibration-images", 8, "--modulation", "float", "--out", tmp_path / "int8",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]
    with Pipeline.load(tmp_path / "int8") as pipe:
        assert pipe.manifest.precision == "int8" and pipe.manifest.float_type == "float16"
        assert not pipe.manifest.has("image_encoder.onnx")
        assert pipe.generate([1], seed=1).shape == (1, pipe.manifest.model.image_size, pipe.manifest.model.image_size, 3)


def test_precision_without_pytorch(tmp_path: Path, engines: Callable[[str], Path]) -> None:
    code = "import sys; sys.modules['torch'] = None; from enat.export.cli import main; main()"
    arguments = ["--engine", engines("tiny"), "--precision", "int8", "--calibration-images", 8, "--out", tmp_path / "int8"]
    result = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert read_manifest(tmp_path / "int8").precision == "int8"


def test_precisions_have_names() -> None:
    for arguments in (("fp8",), ("int8", "bf16")):
        with pytest.raises(InputError, match="expected"):
            Precision(*arguments)
    assert dataclasses.astuple(Precision("int8")) == ("int8", "fp32")
    help_text = " ".join(invoke(export_main, "--help").stdout.split())
    assert f"0 for none; default: {ALPHA}." in help_text
    assert f"draws to be watched; default: {Settings().images}." in help_text


def test_engines_whose_files_have_other_names_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those have that a model repository shares them with; but weights that a graph looks for elsewhere are not read."""
    monkeypatch.setattr("enat.graph_file.EXTERNAL_DATA_FROM", 100_000)
    engine = Path(shutil.copytree(BUNDLED_ENGINE, tmp_path / "engine"))
    for name in ("encoder", "decoder", "image_decoder"):
        save(ir.load(engine / f"{name}.onnx"), engine / f"{name}.onnx")
        (tmp_path / f"{name}.data").hardlink_to(engine / f"{name}.onnx.data")
    list_anew(engine)
    assert convert_engine(engine, tmp_path / "fp16", Precision("fp16")).top1 > 0.98
    assert (tmp_path / "fp16" / "encoder.onnx.data").is_file()
    model = onnx.load(engine / "encoder.onnx", load_external_data=False)
    for one in model.graph.initializer:
        for entry in one.external_data:
            if entry.key == "location":
                entry.value = "../encoder.data"
    onnx.save(model, engine / "encoder.onnx")
    with pytest.raises(EngineError, match=r"encoder\.onnx: its weights .* lie outside its folder"):
        load(engine / "encoder.onnx")
