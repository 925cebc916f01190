"""Q/DQ pairs written into graphs: 8-bit weights, 8-bit inputs of the products that multiply with them.

Weights: int8, symmetric, a scale for every output channel. Inputs: symmetric, one scale a tensor, stored unsigned with zero point 128,
which ONNX Runtime's kernels want; the signed number 128 less is the same value. Nothing is quantized behind a matrix product; behind a
convolution the output is, since ONNX Runtime convolves in 8 bits only between two quantized tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .products import Graphs, Group, Product, fixed

ZERO_POINT = 128
INPUT_LIMIT = 127
LARGEST_BIAS = 2**30  # ONNX Runtime adds a convolution's bias in 32 bits, in steps of the input's scale times the channel's
WEIGHT_LIMITS = {8: 127, 7: 63}  # bits → largest magnitude; 7 bits keep 255·63·2 within the 16 bits of kernels without VNNI

Floats = NDArray[np.float32]
Ranges = Mapping[tuple[str, str], float]  # (graph, value name) → largest magnitude

# (graph, group, quantized value, float value) → what is used: a choice between the two at run time, or simply the first
Switch = Callable[[ir.Graph, Group, ir.Value, ir.Value], ir.Value]


def always(graph: ir.Graph, group: Group, quantized: ir.Value, value: ir.Value) -> ir.Value:
    return quantized


def quantize(graphs: Graphs, groups: Collection[Group], ranges: Ranges, weight_bits: int = 8, switch: Switch = always) -> Graphs:
    """Copies of the graphs with the groups' products in 8 bits. ranges: of every group's input, and of convolutions' outputs."""
    result = dict(graphs)
    for graph in {group.graph for group in groups}:
        result[graph] = model = graphs[graph].clone()
        nodes = {node.name: node for node in model.graph}
        for group in groups:
            if group.graph != graph:
                continue
            consumers = [nodes[product.name] for product in group.products]
            value = consumers[0].inputs[0]
            assert value is not None
            limit, producer = ranges[graph, group.input], value.producer()
            if producer is None or producer.op_type != "DequantizeLinear":  # of a convolution's output, by the same range
                value = switch(model.graph, group, quantized_value(model.graph, value, limit), value)
            for product, node in zip(group.products, consumers, strict=True):
                node.replace_input_with(0, value)
                weight = node.inputs[1]
                assert weight is not None
                bias = node.inputs[2] if len(node.inputs) > 2 else None
                least = 0.0 if bias is None else (np.abs(array(bias)) / (step_of(limit) * LARGEST_BIAS)).astype(np.float32)
                quantized = quantized_weights(model.graph, weight, product, WEIGHT_LIMITS[weight_bits], least)
                node.replace_input_with(1, switch(model.graph, group, quantized, weight))
                if product.kind == "Conv":
                    output = node.outputs[0]
                    users = list(output.uses())
                    used_output = switch(model.graph, group, quantized_value(model.graph, output, ranges[graph, product.output]), output)
                    for user, index in users:
                        user.replace_input_with(index, used_output)
        drop_unused(model.graph)
    return result


def quantized_value(graph: ir.Graph, value: ir.Value, limit: float) -> ir.Value:
    """Q and DQ right behind what makes a value; returns what is used in its place."""
    producer = value.producer()
    assert producer is not None
    scale = constant(graph, f"{value.name}_scale", step_of(limit))
    zero = constant(graph, f"{value.name}_zero_point", np.uint8(ZERO_POINT))
    q = ir.node("QuantizeLinear", [value, scale, zero], name=f"{value.name}_quantize")
    dq = ir.node("DequantizeLinear", [q.outputs[0], scale, zero], name=f"{value.name}_dequantize")
    for node, suffix, dtype in ((q, "quantized", ir.DataType.UINT8), (dq, "dequantized", ir.DataType.FLOAT)):
        describe(node, f"{value.name}_{suffix}", value.shape, dtype)
    graph.insert_after(producer, [q, dq])
    return dq.outputs[0]


def step_of(limit: float) -> np.float32:
    """The scale of values of this largest magnitude; of what was always 0, float16 holds no other."""
    return np.float32(max(limit / INPUT_LIMIT, float(np.finfo(np.float32).tiny)) if limit else 1.0)


def quantized_weights(graph: ir.Graph, weight: ir.Value, product: Product, limit: int, least: Floats | float) -> ir.Value:
    """DQ on 8-bit weights; returns what takes the place of a product's float weights, and their name. least: of the scales."""
    levels, scales = quantize_channels(array(weight), product.weight_axis, limit, least)
    name = f"{product.name}.weight"
    weight.name = f"{name}_float"
    stored = [constant(graph, f"{name}_int8", levels), constant(graph, f"{name}_scale", scales)]
    dq = ir.node("DequantizeLinear", stored, {"axis": product.weight_axis}, name=f"{name}_dequantize")
    describe(dq, name, weight.shape, ir.DataType.FLOAT)
    graph.insert_before(next(iter(graph)), dq)
    return dq.outputs[0]


def quantize_channels(weights: Floats, axis: int, limit: int, least: Floats | float = 0.0) -> tuple[NDArray[np.int8], Floats]:
    """weights → int8 of the same shape in [−limit, limit], and a scale for every index along `axis`. least: of the scales."""
    others = tuple(i for i in range(weights.ndim) if i != axis)
    magnitudes = np.abs(weights).max(axis=others)
    scales = np.maximum(np.where(magnitudes > 0, magnitudes / limit, 1), least).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weights.ndim)]
    return np.clip(np.rint(weights / scales.reshape(shape)), -limit, limit).astype(np.int8), scales


def shuffle_levels(model: ir.Model) -> None:
    """Blocks of pixels behind an 8-bit convolution (DepthToSpace) are put in their places, and cut (Slice), before they are floats again,
    all channels of a pixel in one piece: ONNX Runtime's DepthToSpace moves them one by one, in one thread.
    """
    graph = model.graph
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "DepthToSpace" else None
        dequantize = value.producer() if value is not None else None
        if value is None or dequantize is None or dequantize.op_type != "DequantizeLinear" or len(value.uses()) > 1:
            continue
        assert value.shape is not None and node.attributes.get_string("mode", "DCR") == "DCR"
        channels, height, width = (fixed(size) for size in value.shape[1:])
        block = node.attributes["blocksize"].as_int()
        kept = channels // block**2
        levels = dequantize.inputs[0]
        for number, (operator, numbers) in enumerate(
            (
                ("Transpose", [0, 2, 3, 1]),
                ("Reshape", [0, height, width, block, block, kept]),  # 0: as it was
                ("Transpose", [0, 1, 3, 2, 4, 5]),
                ("Reshape", [0, block * height, block * width, kept]),
                ("Transpose", [0, 3, 1, 2]),
            )
        ):
            assert levels is not None and levels.shape is not None and levels.dtype is not None
            name = f"{node.name}_move_{number}"
            if operator == "Transpose":
                move, shape = ir.node(operator, [levels], {"perm": numbers}, name=name), [levels.shape[axis] for axis in numbers]
            else:
                sizes = constant(graph, f"{name}_shape", np.array(numbers, np.int64))
                move, shape = ir.node(operator, [levels, sizes], name=name), [levels.shape[0], *numbers[1:]]
            describe(move, name, ir.Shape(shape), levels.dtype)
            graph.insert_before(node, move)
            levels = move.outputs[0]
        users = list(node.outputs[0].uses())
        if len(users) == 1 and users[0].node.op_type == "Slice":
            move = users[0].node
            move.replace_input_with(0, levels)
            move.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
            users = list(move.outputs[0].uses())
        dequantize.replace_input_with(0, move.outputs[0])
        dequantize.outputs[0].shape = move.outputs[0].shape
        for user, index in users:
            user.replace_input_with(index, dequantize.outputs[0])
        graph.remove(node, safe=True)
        graph.remove(dequantize)
        graph.insert_after(move, dequantize)


def quantize_tables(condition: ir.Model) -> ir.Model:
    """The modulation tables in 8 bits with one scale a column: an entry is level · scale + the middle of its column's range."""
    model = condition.clone()
    graph = model.graph
    for index, output in enumerate(list(graph.outputs)):
        gather = output.producer()
        assert gather is not None and gather.inputs[0] is not None
        table = gather.inputs[0]
        name, levels, scales, middle = str(table.name), *quantize_columns(array(table))
        rows = ir.node("Gather", [constant(graph, f"{name}_int8", levels), gather.inputs[1]])
        cast = ir.node("Cast", [rows.outputs[0]], {"to": int(ir.DataType.FLOAT)})
        scaled = ir.node("Mul", [cast.outputs[0], constant(graph, f"{name}_scale", scales)])
        moved = ir.node("Add", [scaled.outputs[0], constant(graph, f"{name}_middle", middle)])
        describe(rows, f"{name}_levels", output.shape, ir.DataType.INT8)
        for node, suffix in ((cast, "cast"), (scaled, "scaled"), (moved, "moved")):
            describe(node, f"{name}_{suffix}", output.shape, ir.DataType.FLOAT)
        graph.insert_after(gather, [rows, cast, scaled, moved])
        graph.outputs[index] = moved.outputs[0]
        graph.remove(gather, safe=True)
        moved.outputs[0].name = output.name
    drop_unused(graph)
    return model


def quantize_columns(table: Floats) -> tuple[NDArray[np.int8], Floats, Floats]:
    """A table [rows, …] → int8 levels of its shape, and scale and middle of every column."""
    low, high = table.min(0), table.max(0)
    scales = ((high - low) / (2 * INPUT_LIMIT)).astype(np.float32)
    scales[scales == 0] = 1  # a column of one value, or of a spread too small for float32
    middle = ((low + high) / 2).astype(np.float32)
    levels = np.empty(table.shape, np.int8)
    for row, values in enumerate(table):  # row by row: at size L the table has 0.8 GB
        levels[row] = np.clip(np.rint((values - middle) / scales), -INPUT_LIMIT, INPUT_LIMIT)
    return levels, scales, middle


def describe(node: ir.Node, name: str, shape: ir.Shape | None, dtype: ir.DataType) -> None:
    output = node.outputs[0]
    output.name, output.shape, output.type = name, shape, ir.TensorType(dtype)


def array(value: ir.Value) -> Floats:
    assert value.const_value is not None
    return value.const_value.numpy()


def constant(graph: ir.Graph, name: str, values: np.generic | NDArray[np.generic]) -> ir.Value:
    """A new initializer of a graph."""
    tensor = ir.tensor(np.asarray(values), name=name)
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def own(graph: ir.Graph, node: ir.Node, index: int) -> ir.Value:
    """A node's constant, to be changed. PyTorch's exporter makes one of small ones that are equal: where others use it, a copy."""
    value = node.inputs[index]
    assert value is not None
    if len(value.uses()) > 1:
        value = constant(graph, f"{node.outputs[0].name}_input_{index}", array(value))
        node.replace_input_with(index, value)
    return value


def drop_unused(graph: ir.Graph) -> None:
    """Takes out constants that nothing reads any more."""
    for name in [name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]:
        graph.initializers.pop(name)
