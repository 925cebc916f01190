"""What TensorRT takes of ONNX: operators, types and restrictions, as far as engines use them.

From onnx-tensorrt's docs/operators.md for TensorRT 10.15 (opsets 9 to 24), which lies between the versions that enat serves; the
operators below carry the same rows since 10.0. Types are of the first input, and for Cast of the output too. "INT64 indices" of
Gather, Slice and the like are taken as they are since 10.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import numpy_helper
from operator_types import not_in_table, with_types

FLOATS = {"FLOAT", "FLOAT16", "BFLOAT16"}
NUMBERS = {*FLOATS, "INT32", "INT64"}
ANY = {*NUMBERS, "BOOL"}
MOST_DIMENSIONS = 8
TOPK_LIMIT = 3840

TYPES = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Min", "Pow", "ArgMin", "ReduceSum", "LessOrEqual", "ScatterElements", "TopK"), NUMBERS),
    **dict.fromkeys(
        ("Concat", "Expand", "Gather", "GatherElements", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"), ANY
    ),
    **dict.fromkeys(("AveragePool", "Clip", "Conv", "CumSum", "Floor", "InstanceNormalization", "LayerNormalization"), FLOATS),
    **dict.fromkeys(("LogSoftmax", "MatMul", "Resize", "Sigmoid", "Softmax", "QuantizeLinear"), FLOATS),
    "DepthToSpace": {"FLOAT", "FLOAT16", "INT32", "INT64"},
    "Gelu": {*NUMBERS, "INT8"},
    "Cast": {*ANY, "UINT8"},
    "DequantizeLinear": {"INT8"},
}

Known = Mapping[str, onnx.TensorProto]  # initializers


def constant(node: onnx.NodeProto, index: int, known: Known) -> bool:
    return len(node.input) <= index or not node.input[index] or node.input[index] in known


def attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    return next((onnx.helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def zero_point(node: onnx.NodeProto, known: Known) -> bool:
    return len(node.input) < 3 or not np.any(numpy_helper.to_array(known[node.input[2]]))


RESTRICTIONS: dict[str, tuple[str, Callable[[onnx.NodeProto, Known], bool]]] = {
    "CumSum": ("axis is constant", lambda node, known: constant(node, 1, known)),
    "QuantizeLinear": ("the zero point is 0", zero_point),
    "DequantizeLinear": ("the zero point is 0", zero_point),
    "InstanceNormalization": ("scale and bias are constant", lambda node, known: constant(node, 1, known) and constant(node, 2, known)),
    "ReduceSum": ("axes are constant", lambda node, known: constant(node, 1, known)),
    "Squeeze": ("axes are constant", lambda node, known: constant(node, 1, known)),
    "Unsqueeze": ("axes are constant", lambda node, known: constant(node, 1, known)),
    "Slice": ("axes are constant", lambda node, known: constant(node, 3, known)),
    "LayerNormalization": ("only the first output", lambda node, known: len([name for name in node.output if name]) == 1),
    "TopK": ("sorted is 1", lambda node, known: attribute(node, "sorted", 1) == 1),
    "AveragePool": ("no dilation", lambda node, known: set(attribute(node, "dilations", [1])) == {1}),  # type: ignore[call-overload]
    "Resize": (
        "nearest by floor from asymmetric or half-pixel coordinates",
        lambda node, known: (
            attribute(node, "mode", b"nearest") == b"nearest"
            and attribute(node, "coordinate_transformation_mode", b"half_pixel") in (b"asymmetric", b"half_pixel")
            and attribute(node, "nearest_mode", b"round_prefer_floor") in (b"floor", b"round_prefer_floor")
        ),
    ),
}


def objections(model: onnx.ModelProto) -> list[str]:
    """What TensorRT would not take of a graph, one line each."""
    model, types = with_types(model)
    graph = model.graph
    known = {tensor.name: tensor for tensor in graph.initializer}
    ports = {port.name for port in (*graph.input, *graph.output)}
    found = []
    for value in (*graph.input, *graph.value_info, *graph.output):
        rank = len(value.type.tensor_type.shape.dim)
        if rank > MOST_DIMENSIONS:
            found.append(f"{value.name}: {rank} dimensions")
        if types[value.name] == "UINT8" and value.name not in ports:
            found.append(f"{value.name}: UINT8 inside the graph")
    for node in graph.node:
        found += not_in_table(node, types, TYPES)
        text, holds = RESTRICTIONS.get(node.op_type, ("", lambda node, known: True))
        if not holds(node, known):
            found.append(f"{node.op_type} {node.output[0]}: expected that {text}")
    return found
