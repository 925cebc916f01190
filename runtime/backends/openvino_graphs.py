"""Graphs in forms that suit OpenVINO's CPU plugin better; what they compute stays the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino import Model
from openvino import opset13 as ops


def rewrite(model: Model) -> dict[str, str]:
    """Changes a graph of an engine in place. Returns the settings that it must be compiled with."""
    nodes = model.get_ordered_ops()
    quantized = any(node.get_type_name() == "FakeQuantize" for node in nodes)
    for node in nodes:
        if node.get_type_name() == "MatMul":
            split_heads_of_parts(node)
        elif node.get_type_name() == "Add":
            gather_shift(node)
        elif node.get_type_name() == "Transpose":
            join_shuffle(node)
        elif node.get_type_name() == "MVN" and quantized:
            spell_out_group_norm(node)
    left = {node.get_type_name() for node in model.get_ordered_ops()}
    # Without OpenVINO's 8-bit pass, products run as floats of 8 bits' values: slower, but right.
    return {"LP_TRANSFORMS_MODE": "NO"} if left >= {"MVN", "Convolution", "FakeQuantize"} else {}


def split_heads_of_parts(product: Any) -> None:
    """Queries times keys of context and own tokens, joined, then transposed number by number: each part is transposed in whole rows, as
    soon as it is computed, and the product reads them crosswise.
    """
    keys = product.input_value(1).get_node()
    if keys.get_type_name() != "Transpose" or product.get_attributes()["transpose_b"]:
        return
    order, split = constant_behind(keys.input_value(1)), keys.input_value(0).get_node()
    if order is None or order.tolist() != [0, 2, 3, 1] or split.get_type_name() != "Reshape":
        return
    joined = split.input_value(0).get_node()
    parts, width = list(joined.input_values()), list(split.output(0).get_partial_shape())[2:]
    if joined.get_type_name() != "Concat" or joined.get_attributes()["axis"] != 1 or any(dimension.is_dynamic for dimension in width):
        return
    heads, size = (dimension.get_length() for dimension in width)
    shape = integers(0, 0, heads, size)  # 0: as it was
    parts = [ops.transpose(ops.reshape(part, shape, special_zero=True), integers(0, 2, 1, 3)) for part in parts]
    changed = ops.matmul(product.input_value(0), ops.concat(parts, 2), product.get_attributes()["transpose_a"], True)
    product.output(0).replace(changed.output(0))


def gather_shift(addition: Any) -> None:
    """A modulation's shift, one of the parts of a Split: taken by itself, since OpenVINO joins no Add that reads a Split with what is
    before it, and scaling, shifting and quantizing would pass over the features twice.
    """
    for port in addition.inputs():
        value = port.get_source_output()
        split = value.get_node()
        if split.get_type_name() == "Split":
            axis = constant_behind(split.input_value(1))
            if axis is not None and value.get_partial_shape()[int(axis)] == 1:
                port.replace_source_output(ops.gather(split.input_value(0), integers(value.get_index()), integers(int(axis))).output(0))


def join_shuffle(last: Any) -> None:
    """Blocks of pixels put in their places by five operators, as suits ONNX Runtime: by DepthToSpace, which OpenVINO has a kernel for."""
    orders: list[list[int]] = []
    shapes: list[list[int]] = []
    value = last.output(0)
    for kind in ("Transpose", "Reshape", "Transpose", "Reshape", "Transpose"):
        node = value.get_node()
        numbers = constant_behind(node.input_value(1)) if node.get_type_name() == kind else None
        if numbers is None:
            return
        (orders if kind == "Transpose" else shapes).append(numbers.tolist())
        value = node.input_value(0)
    if orders == [[0, 3, 1, 2], [0, 1, 3, 2, 4, 5], [0, 2, 3, 1]] and len(shapes[1]) == 6:
        last.output(0).replace(ops.depth_to_space(value, "blocks_first", shapes[1][3]).output(0))


def spell_out_group_norm(normalization: Any) -> None:
    """GroupNorm, which ONNX graphs have as reshape → InstanceNormalization → reshape, as x · a + b with a and b of each channel.

    OpenVINO's 8-bit pass moves the scales of 8-bit values through an MVN as if it had no epsilon: wrong pictures where features are
    small. Written so it also needs no change of layout, and passes over the features three times: for the means of x and of x², and to
    scale them. E[x²] - E[x]² loses digits where the mean is far above the deviation; of 8-bit values it is at most some hundred times.
    (ReduceL2 is as fast, but OpenVINO 2025.4 to 2026.4 cannot load it on ARM.)
    """
    split, scaled = normalization.input_value(0).get_node(), reader(normalization, "Multiply")
    shifted = reader(scaled, "Add")
    joined = reader(shifted, "Reshape")
    if split.get_type_name() != "Reshape" or joined is None:
        return
    x = split.input_value(0)
    shape = x.get_partial_shape()
    if shape.rank.get_length() != 4 or any(dimension.is_dynamic for dimension in list(shape)[1:]):
        return
    channels = list(shape)[1].get_length()
    groups = split.output(0).get_partial_shape()[1].get_length()
    scale, shift = (constant_behind(node.input_value(1)) for node in (scaled, shifted))
    if scale is None or shift is None:
        return
    size, epsilon = channels // groups, normalization.get_attributes()["eps"]

    def of_channels(values: Any) -> Any:
        return ops.constant(np.repeat(np.float32(values).reshape(groups), size).reshape(1, channels, 1, 1))

    def group_means(of_each_channel: Any) -> Any:
        """[batch, channels, 1, 1], the same for all channels of a group. As a convolution, which keeps the features' layout."""
        return ops.convolution(of_each_channel, averages, [1, 1], [0, 0], [0, 0], [1, 1])

    averages = ops.constant(np.kron(np.eye(groups), np.full((size, size), 1 / size)).astype(np.float32)[..., None, None])
    mean = group_means(ops.reduce_mean(x, integers(2, 3), keep_dims=True))
    square = group_means(ops.reduce_mean(ops.multiply(x, x), integers(2, 3), keep_dims=True))
    variance = ops.maximum(ops.subtract(square, ops.multiply(mean, mean)), scalar(0))
    factor = ops.divide(of_channels(scale), ops.sqrt(ops.add(variance, scalar(epsilon))))
    offset = ops.subtract(of_channels(shift), ops.multiply(mean, factor))
    joined.output(0).replace(ops.add(ops.multiply(x, factor), offset).output(0))


def reader(node: Any, kind: str) -> Any:
    """The node of a kind that computes with a node's output; None where there is not exactly one."""
    targets = node.output(0).get_target_inputs() if node is not None else []
    found = [target.get_node() for target in targets if target.get_index() == 0 and target.get_node().get_type_name() == kind]
    return found[0] if len(found) == 1 else None


def constant_behind(value: Any) -> NDArray[Any] | None:
    """The constant that a value is, or was brought into its shape from; None where it is computed."""
    node = value.get_node()
    while node.get_type_name() in ("Reshape", "Unsqueeze"):
        node = node.input_value(0).get_node()
    return np.array(node.data) if node.get_type_name() == "Constant" else None


def scalar(value: float) -> Any:
    return ops.constant(np.full((1, 1, 1, 1), value, np.float32))


def integers(*values: int) -> Any:
    return ops.constant(np.array(values, np.int64))
