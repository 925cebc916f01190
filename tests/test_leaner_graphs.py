"""Exported graphs compute the same by fewer operators."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from enat.calibration.quantize import shuffle_levels
from enat.export.graphs import LeanAttention, lean_decoder
from enat.export.tensorrt_graphs import dequantize_at_once
from enat.export.tidy import join_slices, shuffle_whole_channels, spell_out_shapes
from enat.models.network import Attention
from enat.models.tokenizer import Tokenizer, TokenizerConfig


@pytest.mark.parametrize(
    ("graph", "changed"),
    [
        ("(float[b, 4, 6] a, float[b, 2, 12] c) => (float[b, 4, 6] y) { s = Shape(a) y = Reshape(c, s) }", [0, 4, 6]),
        ("(float[b, 4, 6] a, float[b, w, 12] c) => (float[b, w, 12] y) { s = Shape(c) y = Reshape(a, s) }", None),
        ("(float[b, 4, 6] a, float[2, b, 12] c) => (float[b, 4, 6] y) { s = Shape(a) y = Reshape(c, s) }", None),
        ("(float[b, 24] a, float[b, 4, 6] c) => (float[24] y) { s = Shape<start = 1>(a) y = Reshape(c, s) }", None),
        ("(float[b, 4, 6] a, float[b, 24] c) => (float[b, 4, 6] y, int64[3] s) { s = Shape(a) y = Reshape(c, s) }", [0, 4, 6]),
    ],
)
def test_shapes_that_are_known_are_spelled_out(graph: str, changed: list[int] | None) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {graph}')
    traced = ir.from_proto(model)
    spell_out_shapes(traced)
    result = ir.to_proto(traced)
    onnx.checker.check_model(result, full_check=True)
    assert [onnx.numpy_helper.to_array(one).tolist() for one in result.graph.initializer] == ([changed] if changed else [])
    rng = np.random.default_rng(0)
    inputs = {
        value.name: rng.random([dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim], np.float32) for value in model.graph.input
    }
    if changed:
        expected, found = (ReferenceEvaluator(one).run(None, inputs)[0] for one in (model, result))
        assert np.array_equal(expected, found)


SLICES = [
    (("1, 0", "5, -1", "0, 2", "1, 2"), ("1", "-1", "1", "1"), True),
    (("1", "-1", "2", "1"), ("1", "-1", "2", "1"), False),  # along the same axis
    (("1", "-1", "2", "1"), ("1", "-1", "-1", "1"), False),  # which may be the same
    (("1", "-1", "2", "1"), ("l", "-1", "1", "1"), False),  # from where an input says
]


@pytest.mark.parametrize(("first", "second", "joined"), SLICES)
def test_slices_along_several_axes_are_joined(first: tuple[str, ...], second: tuple[str, ...], joined: bool) -> None:
    given = {f"{letter}{i}": value for letter, cut in (("f", first), ("s", second)) for i, value in enumerate(cut)}
    constants = ", ".join(f"int64[{value.count(',') + 1}] {name} = {{{value}}}" for name, value in given.items() if value != "l")
    f, s = (", ".join("l" if given[f"{letter}{i}"] == "l" else f"{letter}{i}" for i in range(4)) for letter in "fs")
    text = f"(float[b, 4, 6] a, int64[1] l) => (float[p, q, r] y) <{constants}> {{ x = Slice(a, {f}) y = Slice(x, {s}) }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {text}')
    traced = ir.from_proto(model)
    join_slices(traced)
    result = ir.to_proto(traced)
    onnx.checker.check_model(result)
    assert [node.op_type for node in result.graph.node].count("Slice") == (1 if joined else 2)
    inputs = {"a": np.random.default_rng(0).random((7, 4, 6), np.float32), "l": np.array([2])}
    expected, found = (ReferenceEvaluator(one).run(None, inputs)[0] for one in (model, result))
    assert found.size and np.array_equal(expected, found)


@pytest.mark.parametrize(
    "uses",
    ["x = Slice(a, s, e, i, k) y = Slice(x, s, e, j, k) z = Neg(x)", "z = Slice(a, s, e, i, k) y = Slice(z, s, e, j, k)"],
    ids=["another node", "an output"],
)
def test_a_slice_that_more_than_the_next_one_reads_stays(uses: str) -> None:
    text = f"""<ir_version: 10, opset_import: ["": 20]> g (float[2, 4, 6] a) => (float[p, q, r] y, float[p, q, r] z)
    <int64[1] s = {{1}}, int64[1] e = {{-1}}, int64[1] i = {{1}}, int64[1] j = {{2}}, int64[1] k = {{1}}> {{ {uses} }}"""
    traced = ir.from_proto(onnx.parser.parse_model(text))
    before = ir.to_proto(traced)
    join_slices(traced)
    assert ir.to_proto(traced) == before


@pytest.mark.parametrize(("another", "mode"), [("Identity(a)", b"DCR"), ("Conv<kernel_shape = [2, 2]>(a, w)", b"DCR"), ("Neg(x)", b"CRD")])
def test_blocks_of_whole_channels(another: str, mode: bytes) -> None:
    """The weights' order and the operator's mode change together; another convolution that uses the same ones gets those that were, and
    where something else reads the channels they stay as they are.
    """
    rng = np.random.default_rng(0)
    text = f"""<ir_version: 10, opset_import: ["": 20]> g (float[b, 3, 5, 5] a) => (float[b, 2, 8, 8] y, float[b, m, p, q] z) {{
      x = Conv<kernel_shape = [2, 2]>(a, w, c)
      y = DepthToSpace<blocksize = 2, mode = "CRD">(x)
      z = {another}
    }}"""
    model = onnx.parser.parse_model(text)
    weights = {"w": rng.random((8, 3, 2, 2), np.float32), "c": rng.random(8, np.float32)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in weights.items())
    traced = ir.from_proto(model)
    shuffle_whole_channels(traced)
    result = ir.to_proto(traced)
    modes = [onnx.helper.get_node_attr_value(node, "mode") for node in result.graph.node if node.op_type == "DepthToSpace"]
    assert modes == [mode]
    inputs = {"a": rng.random((2, 3, 5, 5), np.float32)}
    for expected, found in zip(*(ReferenceEvaluator(one).run(None, inputs) for one in (model, result)), strict=True):
        assert np.allclose(expected, found, atol=1e-6)


@pytest.mark.parametrize("channels", [(32,), (32, 64), (32, 32, 64)])
def test_pictures_in_blocks_are_the_same(channels: tuple[int, ...]) -> None:
    """Upsampling, shortcuts and the last convolution in their form for tracing, in double precision; grids with odd edges too."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(channels, 1, 1, codes=16, code_dim=8)).double()
    tokens = torch.randint(16, (2, 9))
    with torch.inference_mode():
        expected = tokenizer.decode(tokens)
        with lean_decoder(tokenizer):
            names = [name for name, _ in tokenizer.decoder.named_modules()]
            assert len([name for name in names if name.endswith("upsample.conv")]) == len(channels) - 1
            assert not any("shortcut" in name for name in names)
            found = tokenizer.decode(tokens)
        assert torch.equal(tokenizer.decode(tokens), expected)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    assert len(channels) == 1 or not torch.equal(found, expected)  # it was computed in another way


@pytest.mark.parametrize("cut", [True, False])
def test_blocks_of_levels(cut: bool) -> None:
    """Pixels that are put in their places, and cut, as 8-bit numbers; and as floats again, for TensorRT."""
    end = "z = Slice(x, start, stop, axes) y = Neg(z)" if cut else "y = Neg(x)"
    text = f"""<ir_version: 10, opset_import: ["": 20]> g (float[b, 8, 3, 5] a) => (float[b, 2, p, q] y)
    <float scale = {{0.25}}, uint8 zero = {{128}}, int64[2] start = {{1, 1}}, int64[2] stop = {{-1, -1}}, int64[2] axes = {{2, 3}}> {{
      levels = QuantizeLinear(a, scale, zero)
      d = DequantizeLinear(levels, scale, zero)
      x = DepthToSpace<blocksize = 2>(d)
      {end}
    }}"""
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model.graph.node[2].name = "shuffle"
    inputs = {"a": np.random.default_rng(0).normal(0, 10, (2, 8, 3, 5)).astype(np.float32)}
    (expected,) = ReferenceEvaluator(model).run(None, inputs)
    changed = ir.from_proto(model)
    moves = ["Transpose", "Reshape", "Transpose", "Reshape", "Transpose", *["Slice"] * cut]
    for change, order in (
        (shuffle_levels, ["QuantizeLinear", *moves, "DequantizeLinear", "Neg"]),
        (dequantize_at_once, ["QuantizeLinear", "DequantizeLinear", *moves, "Neg"]),
    ):
        change(changed)
        result = ir.to_proto(changed)
        onnx.checker.check_model(result, full_check=True)
        assert [node.op_type for node in result.graph.node] == order
        (found,) = ReferenceEvaluator(result).run(None, inputs)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("seen", [0, 5])
def test_nothing_is_added_to_the_context(seen: int) -> None:
    """Attention in its form for tracing, in double precision, without a context too."""
    torch.manual_seed(0)
    attention = Attention(12, 3).double()
    x, y = torch.randn(2, 4, 12, dtype=torch.double), torch.randn(2, seen, 12, dtype=torch.double)
    with torch.inference_mode():
        lean = LeanAttention(attention)
        expected, found = attention(x, y), lean(x, y)
    assert lean.context_key.bias is None and lean.context_value.bias is None
    assert (found - expected).abs().max() < 1e-12 < expected.abs().max()
