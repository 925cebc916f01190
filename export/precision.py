"""Graphs in float16: weights, features, modulation and products; what sums up or exponentiates stays float32.

Types are written into the graph, cast by cast: TensorRT's strongly typed networks take them as they are, and so does ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from ..calibration.products import is_product
from ..calibration.quantize import drop_unused

FLOAT32_OPS = ("LayerNormalization", "InstanceNormalization", "Softmax")  # statistics and sums of exponentials
FLOAT32_OUTPUTS = ("logits", "images")  # what leads from the last product to these stays float32
NARROWED = ".float16"

# How a table in 8 bits is read.
CONDITION_FLOAT32_OPS = ("Cast", "Mul", "Add")

# A value whose largest magnitude lies outside stays float32: a quarter of float16's range, so that other pictures fit too, and
# upwards of where float16 has fewer digits for it than for others.
LARGEST, SMALLEST = 65504 / 4, 2.0**-14
SMALLEST_SCALE = 2.0**-20  # of 8-bit weights: of smaller ones float16 keeps too few digits, or none


def to_float16(model: ir.Model, wide: Collection[str] = (), float32_ops: Collection[str] = FLOAT32_OPS) -> ir.Model:
    """A copy of a float32 graph in float16. wide: values inside the graph that must stay float32, as float16 cannot hold them."""
    model = model.clone()
    graph = model.graph
    narrow, full = ir.DataType.FLOAT16, ir.DataType.FLOAT
    casts: dict[tuple[str, ir.DataType], ir.Value] = {}
    kept = float32_nodes(graph, set(wide), set(float32_ops))
    for node in graph:
        if node.op_type == "DequantizeLinear" and node not in kept:
            widen_scales(node)
    for port in graph.inputs:
        if port.dtype == full:
            port.type = ir.TensorType(narrow)

    first = next(iter(graph))

    def as_type(value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value, which is no constant, cast to this type: once for all its uses."""
        if value.dtype == dtype:
            return value
        key = (str(value.name), dtype)
        if key not in casts:
            cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}.{dtype.name.lower()}")
            cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = cast.name, value.shape, ir.TensorType(dtype)
            producer = value.producer()
            if producer is None:  # an input of the graph
                graph.insert_before(first, cast)
            else:
                graph.insert_after(producer, cast)
            casts[key] = cast.outputs[0]
        return casts[key]

    for node in list(graph):
        dtype = full if node in kept else narrow
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if value.is_initializer():
                if dtype == narrow and value.const_value is not None and value.const_value.dtype == full:
                    node.replace_input_with(index, narrowed(graph, value))
            elif value.dtype in (full, narrow) and node.op_type != "Cast":
                node.replace_input_with(index, as_type(value, dtype))
        for output in node.outputs:
            if output.dtype == full:
                output.type = ir.TensorType(dtype)
    for index, output in enumerate(list(graph.outputs)):
        wanted = full if output.name in FLOAT32_OUTPUTS else narrow
        if output.dtype in (full, narrow) and output.dtype != wanted:
            name, output.name = output.name, f"{output.name}_computed"
            graph.outputs[index] = as_type(output, wanted)
            graph.outputs[index].name = name
    drop_unused(graph)
    for constant in list(graph.initializers.values()):  # they keep their names
        plain = str(constant.name).removesuffix(NARROWED)
        if plain != constant.name and plain not in graph.initializers:
            constant.name = plain
    return model


def float32_nodes(graph: ir.Graph, wide: set[str], ops: set[str]) -> set[ir.Node]:
    """The nodes that compute in float32."""
    wide = wide | {str(node.outputs[0].name) for node in graph if node.op_type == "DequantizeLinear" and dequantizes_wide(node, wide)}
    kept = set()
    for node in graph:
        values = [value for value in (*node.inputs, *node.outputs) if value is not None]
        cast_up = node.op_type == "Cast" and node.outputs[0].dtype == ir.DataType.FLOAT
        if node.op_type in ops or cast_up or any(value.name in wide or too_wide(value) for value in values):
            kept.add(node)
    pending = [output.producer() for output in graph.outputs if output.name in FLOAT32_OUTPUTS]
    while pending:
        last = pending.pop()
        if last is not None and last not in kept and not is_product(last):
            kept.add(last)
            pending += [value.producer() for value in last.inputs if value is not None]
    return kept


def dequantizes_wide(node: ir.Node, wide: set[str]) -> bool:
    """Whether what comes out of a DequantizeLinear leaves float16's range: the value that was quantized does, or the weights do."""
    levels, scale = node.inputs[:2]
    assert levels is not None and scale is not None and scale.const_value is not None
    if levels.const_value is not None:
        return out_of_range(float(np.abs(scale.const_value.numpy()).max()) * np.iinfo(np.int8).max)
    quantize = levels.producer()
    return quantize is not None and quantize.inputs[0] is not None and quantize.inputs[0].name in wide


def widen_scales(node: ir.Node) -> None:
    """Gives 8-bit weights of channels that are next to nothing a scale that float16 holds, and the levels that go with it."""
    levels, scales = node.inputs[:2]
    assert levels is not None and scales is not None
    if levels.const_value is None or scales.const_value is None or (old := scales.const_value.numpy()).min() >= SMALLEST_SCALE:
        return
    new = np.maximum(old, np.float32(SMALLEST_SCALE))
    shape = [-1 if axis == node.attributes.get_int("axis", 1) else 1 for axis in range(levels.const_value.numpy().ndim)]
    weights = levels.const_value.numpy() * (old / new).reshape(shape)
    levels.const_value = ir.tensor(np.rint(weights).astype(np.int8), name=levels.name)
    scales.const_value = ir.tensor(new, name=scales.name)


def too_wide(value: ir.Value) -> bool:
    """Whether constant weights leave float16's range."""
    if not value.is_initializer() or value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
        return False
    return out_of_range(float(np.abs(value.const_value.numpy()).max(initial=0)))


def out_of_range(magnitude: float) -> bool:
    return magnitude > LARGEST or 0 < magnitude < SMALLEST


def narrowed(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A constant in float16, made once."""
    name = f"{value.name}{NARROWED}"
    if name not in graph.initializers:
        assert value.const_value is not None
        tensor = ir.tensor(value.const_value.numpy().astype(np.float16), name=name)
        graph.register_initializer(ir.Value(name=name, shape=value.shape, type=ir.TensorType(tensor.dtype), const_value=tensor))
    return graph.initializers[name]
