"""What the rewritten graphs of an engine compute on OpenVINO, and what is in them."""

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from openvino import opset13 as ops

from enat import Pipeline
from enat.runtime.backends import openvino_graphs
from enat.runtime.manifest import Manifest

CLASSES = range(36)

pytestmark = pytest.mark.usefixtures("cache")


def encoder_inputs(manifest: Manifest) -> dict[str, NDArray[Any]]:
    rng, model = np.random.default_rng(0), manifest.model
    return {
        "tokens": rng.integers(0, model.codes, (2, 9)),
        "positions": np.tile(np.arange(9), (2, 1)),
        "features": rng.standard_normal((4, 20, model.dim), np.float32),
        "encoder_modulation": rng.standard_normal((4, model.encoder_depth, 8, model.dim), np.float32),
    }


def test_rewritten_graphs_compute_the_same(reference: Pipeline) -> None:
    """Each graph as it is read, and rewritten."""
    core, manifest = ov.Core(), reference.manifest
    depth, length = manifest.model.encoder_depth, manifest.model.length
    encoder = encoder_inputs(manifest)
    tokens = np.random.default_rng(0).integers(0, manifest.model.codes, (2, length))
    decoder = {"tokens": tokens, "positions": np.tile(np.arange(length), (2, 1))}
    changes = {
        "attention": ("encoder", encoder, "MatMul", openvino_graphs.ease_attention),
        "joined attention": ("encoder", encoder, "MatMul", functools.partial(openvino_graphs.ease_attention, join=True)),
        "modulation": ("encoder", encoder, "Parameter", openvino_graphs.spread_modulation),
        "group norms": ("image_decoder", decoder, "MVN", openvino_graphs.spell_out_group_norm),
    }
    rewritten = {}
    for name, (graph, inputs, kind, change) in changes.items():
        plain, changed = (core.read_model(manifest.path(f"{graph}.onnx")) for _ in range(2))
        for node in of_kind(changed, kind):
            change(node)
        rewritten[name] = changed
        compiled = (core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}) for model in (plain, changed))
        wanted, found = (model(inputs)[0].astype(np.float32) for model in compiled)
        assert np.abs(found - wanted).max() <= (1 if kind == "MVN" else 1e-4 * np.abs(wanted).max())
    products = {name: of_kind(rewritten[name], "MatMul") for name in ("attention", "joined attention")}
    assert all(sum(node.get_attributes()["transpose_b"] for node in found) == depth for found in products.values())
    assert len(products["attention"]) - len(products["joined attention"]) == 2 * depth
    computed = [node for node in of_kind(rewritten["attention"], "Reshape") if node.input_value(1).get_node().get_type_name() != "Constant"]
    assert not any(node.get_output_partial_shape(0).rank.get_length() == 4 for node in computed)
    assert len(of_kind(rewritten["modulation"], "Split")) == 2  # scales, gates
    additions = of_kind(rewritten["modulation"], "Add")
    assert not any(value.get_node().get_type_name() == "Split" for node in additions for value in node.input_values())
    assert not of_kind(rewritten["group norms"], "MVN")


@pytest.mark.parametrize("graph", ["image_decoder", "image_encoder"])
def test_all_that_is_elementwise_is_one_kernel(reference: Pipeline, graph: str) -> None:
    """Between convolutions and means, where shapes are known beforehand; and the pictures and tokens are the same."""
    core, manifest = ov.Core(), reference.manifest
    tokens = reference.generate_tokens([3, 4], seed=0)
    inputs: Any = {"tokens": tokens.reshape(2, -1).view(np.int64), "positions": np.tile(np.arange(manifest.model.length), (2, 1))}
    if graph == "image_encoder":
        inputs = {"images": reference.decode(tokens)}
    found = []
    for pictures in (None, 2):
        model = core.read_model(manifest.path(f"{graph}.onnx"))
        openvino_graphs.rewrite(model, pictures=pictures)
        assert len(of_kind(model, "Sigmoid")) == (0 if pictures else len(of_kind(model, "ReduceMean")) / 2)
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found.append(compiled(inputs)[0].astype(int))
        kinds = Counter(node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ordered_ops())
        assert not pictures or "Eltwise" not in kinds
    same = np.abs(found[0] - found[1]) <= (graph == "image_decoder")
    assert same.mean() > 0.99


def test_blocks_of_pixels_have_a_kernel(precisions: dict[str, Path]) -> None:
    """What puts the levels of 8-bit graphs in their places is DepthToSpace to OpenVINO."""
    model = ov.Core().read_model(precisions["int8"] / "image_decoder.onnx")
    blocks = [node for node in of_kind(model, "Reshape") if node.get_output_partial_shape(0).rank.get_length() == 6]
    shuffles = len(of_kind(model, "DepthToSpace"))
    assert blocks
    for node in of_kind(model, "Transpose"):
        openvino_graphs.join_shuffle(node)
    assert len(of_kind(model, "DepthToSpace")) == shuffles + len(blocks)
    assert not any(node.get_output_partial_shape(0).rank.get_length() == 6 for node in of_kind(model, "Reshape"))


def test_outputs_of_8_bit_convolutions_stay_float(precisions: dict[str, Path], reference: Pipeline) -> None:
    """Quantized, as ONNX Runtime needs them, only where a convolution reads them; pictures are nearer to float32's than ONNX Runtime's."""
    model = ov.Core().read_model(precisions["int8"] / "image_decoder.onnx")
    openvino_graphs.rewrite(model)
    for quantize in of_kind(model, "FakeQuantize"):
        assert openvino_graphs.convolution_behind(quantize.input_value(0)) is None

    classes = list(range(0, 36, 3))
    tokens = reference.generate_tokens(classes, seed=3)
    wanted = reference.decode(tokens).astype(float)
    error = {}
    for backend in ("openvino", "onnxruntime"):
        with Pipeline.load(precisions["int8"], backend=backend) as pipeline:
            error[backend] = ((pipeline.decode(tokens) - wanted) ** 2).mean()
    assert error["openvino"] < error["onnxruntime"] / 1.5


def contract(model: ov.Model) -> list[tuple[set[str], str]]:
    return [(value.names, openvino_graphs.element_type(value)) for value in (*model.inputs, *model.outputs)]


@pytest.mark.parametrize("graph", ["encoder", "decoder", "image_decoder"])
@pytest.mark.parametrize("names", [("fp32", "fp16"), ("int8", "int8-fp16")])
def test_graphs_of_float16_become_those_of_float32(
    precisions: dict[str, Path], reference: Pipeline, names: tuple[str, str], graph: str
) -> None:
    """All but what goes in and out: so they get the same kernels, and are as fast."""
    kinds = {}
    for name in names:
        model = ov.Core().read_model(precisions.get(name, reference.manifest.folder) / f"{graph}.onnx")
        given = contract(model)
        assert openvino_graphs.rewrite(model) == {}  # with OpenVINO's 8-bit pass
        assert contract(model) == given
        nodes = [node for node in model.get_ordered_ops() if node.get_type_name() not in ("Constant", "Convert")]
        kinds[name] = Counter(node.get_type_name() for node in nodes)
        inside = [value for node in nodes if node.get_type_name() not in ("Parameter", "Result") for value in node.outputs()]
        assert "f16" not in {openvino_graphs.element_type(value) for value in inside}
    assert kinds[names[0]] == kinds[names[1]]


def test_signed_features_are_the_same_numbers(precisions: dict[str, Path], reference: Pipeline) -> None:
    """All that products read become signed with AMX, where keys and values are joined, too; the features differ by what a rounding moves
    now and then."""
    core = ov.Core()
    inputs = encoder_inputs(reference.manifest)
    found = []
    for tiles in (False, True):
        graph = core.read_model(precisions["int8"] / "encoder.onnx")
        settings = openvino_graphs.rewrite(graph, tiles, bfloat16=tiles)
        lows = {float(openvino_graphs.constant_behind(node.input_value(3)).min()) for node in of_kind(graph, "FakeQuantize")}
        assert lows == {-128.0 if tiles else 0.0}
        found.append(core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32", **settings})(inputs)[0])
    assert np.abs(found[0] - found[1]).mean() < 1e-3 * found[0].std()


def test_attention_is_quantized_in_one_pass(precisions: dict[str, Path], reference: Pipeline) -> None:
    """By a node that does something else too; on its own, FakeQuantize takes float32, into which OpenVINO brings bfloat16 before."""
    core, inputs, found = ov.Core(), encoder_inputs(reference.manifest), []
    for change in (lambda model: None, openvino_graphs.rewrite):
        model = core.read_model(precisions["int8"] / "encoder.onnx")
        change(model)
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ordered_ops()]
        found.append((kinds.count("FakeQuantize"), compiled(inputs)[0]))
    (alone, wanted), (left, features) = found
    assert alone == reference.manifest.model.encoder_depth and left == 0
    assert np.abs(features - wanted).mean() < 1e-3 * wanted.std()


def test_zeros_around_convolutions_are_there_before_quantizing(precisions: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures. With AMX, whose kernel does not need it, they are left to the convolution."""
    core, found = ov.Core(), []
    tokens = np.random.default_rng(0).integers(0, 512, (2, 64))

    def upsamplings(model: ov.Model) -> list[Any]:
        return [node for node in of_kind(model, "Convolution") if list(node.input_value(1).get_shape())[2:] == [2, 2]]

    for tiles, padded in ((True, False), (False, True), (False, False)):
        if not (tiles or padded):
            monkeypatch.setattr(openvino_graphs, "pad_beforehand", lambda node: None)
        model = core.read_model(precisions["int8"] / "image_decoder.onnx")
        openvino_graphs.rewrite(model, tiles)
        found_here = upsamplings(model)
        assert found_here and all(any(node.get_attributes()["pads_begin"]) != padded for node in found_here)
        assert len(of_kind(model, "Pad")) == len(found_here) * padded
        if not tiles:
            compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            found.append(compiled({"tokens": tokens, "positions": np.tile(np.arange(64), (2, 1))})[0])
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize(("mean", "deviation"), [(128, 20), (128, 1), (128, 0.5), (160, 1), (20, 3)])
def test_group_norms_of_8_bit_values(mean: float, deviation: float) -> None:
    """Values that need few of the 256 steps, far from 0: what comes out is taken into 256 steps of some 0.03 again."""
    channels, groups, side, zero, step, epsilon = 16, 4, 64, 128, 0.01, 1e-6
    rng = np.random.default_rng(0)
    codes = rng.normal(mean, deviation, (2, channels, side, side)).round().clip(0, 255).astype(np.uint8)
    scale, shift = rng.normal(size=(2, 1, groups, 1)).astype(np.float32)
    weight, bias = rng.normal(size=(2, 1, channels, 1, 1)).astype(np.float32)

    given = ops.parameter([-1, channels, side, side], np.uint8)
    x = ops.multiply(ops.subtract(ops.convert(given, "f32"), np.float32(zero)), np.float32(step))
    normalized = ops.mvn(ops.reshape(x, [0, groups, -1], True), [2], True, epsilon, "inside_sqrt")
    y = ops.reshape(ops.add(ops.multiply(normalized, scale), shift), [0, channels, side, side], True)
    model = ov.Model([ops.add(ops.multiply(y, weight), bias)], [given])
    for node in of_kind(model, "MVN"):
        openvino_graphs.spell_out_group_norm(node)
    assert not of_kind(model, "MVN")
    found = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(codes)[0]

    values = ((codes - float(zero)) * step).reshape(2, groups, -1)
    wanted = (values - values.mean(2, keepdims=True)) / np.sqrt(values.var(2, keepdims=True) + epsilon) * scale + shift
    assert np.abs(found - (wanted.reshape(found.shape) * weight + bias)).max() < 5e-3


def of_kind(model: ov.Model, kind: str) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() == kind]


def test_group_norms_of_a_form_that_is_not_known(precisions: dict[str, Path], reference: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO's 8-bit pass would give wrong pictures: it is left out then."""
    monkeypatch.setenv("ENAT_CACHE", "")
    monkeypatch.setattr(openvino_graphs, "spell_out_group_norm", lambda node: None)
    tokens = reference.generate_tokens(CLASSES, seed=0)
    with Pipeline.load(precisions["int8"], "openvino") as engine:
        error = (engine.decode(tokens).astype(float) - reference.decode(tokens)) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 37
