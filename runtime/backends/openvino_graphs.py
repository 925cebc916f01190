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
            keep_keys_in_rows(node)
        elif node.get_type_name() == "MVN" and quantized:
            spell_out_group_norm(node)
    left = {node.get_type_name() for node in model.get_ordered_ops()}
    # Without OpenVINO's 8-bit pass, products run as floats of 8 bits' values: slower, but right.
    return {"LP_TRANSFORMS_MODE": "NO"} if left >= {"MVN", "Convolution", "FakeQuantize"} else {}


def keep_keys_in_rows(product: Any) -> None:
    """Queries times keys whose dimensions were swapped one by one: whole rows move, and the product reads them crosswise.

    OpenVINO moves single numbers for the first form. On two cores an encoder with much context took 10 % longer for it.
    """
    keys, crosswise = product.input_value(1).get_node(), product.get_attributes()["transpose_b"]
    if keys.get_type_name() != "Transpose" or crosswise:
        return
    order = constant_behind(keys.input_value(1))
    if order is not None and order.tolist() == [0, 2, 3, 1]:
        rows = ops.transpose(keys.input_value(0), integers(0, 2, 1, 3))
        changed = ops.matmul(product.input_value(0), rows, product.get_attributes()["transpose_a"], True)
        product.output(0).replace(changed.output(0))


def spell_out_group_norm(normalization: Any) -> None:
    """GroupNorm, which ONNX graphs have as reshape → InstanceNormalization → reshape, as means and products over the pixels.

    OpenVINO's 8-bit pass moves the scales of 8-bit values through an MVN as if it had no epsilon: wrong pictures where features are
    small. It also needs no change of layout then: a third less time for size L's 8-bit image decoder.
    """
    split, scaled = normalization.input_value(0).get_node(), reader(normalization, "Multiply")
    shifted = reader(scaled, "Add")
    joined = reader(shifted, "Reshape")
    if split.get_type_name() != "Reshape" or joined is None:
        return
    x = split.input_value(0)
    if x.get_partial_shape().rank.get_length() != 4:
        return
    channels, groups = (value.get_partial_shape()[1].get_length() for value in (x, split.output(0)))
    size = channels // groups
    scale, shift = (constant_behind(node.input_value(1)) for node in (scaled, shifted))
    if scale is None or shift is None:
        return
    scale, shift = scale.reshape(1, groups, 1), shift.reshape(1, groups, 1)

    def group_means(values: Any) -> Any:
        """[batch, channels, height, width] → [batch, groups, 1]"""
        means = ops.reshape(ops.reduce_mean(values, integers(2, 3)), integers(0, groups, size), special_zero=True)  # 0: the batch
        return ops.reduce_mean(means, integers(2), keep_dims=True)

    def of_channels(values: Any) -> Any:
        """[batch, groups, 1] → [batch, channels, 1, 1]"""
        return ops.reshape(ops.tile(values, integers(1, 1, size)), integers(0, channels, 1, 1), special_zero=True)

    centred = ops.subtract(x, of_channels(group_means(x)))
    variance = group_means(ops.multiply(centred, centred))
    deviation = ops.sqrt(ops.add(variance, ops.constant(np.float32(normalization.get_attributes()["eps"]))))
    normalized = ops.multiply(centred, of_channels(ops.divide(ops.constant(scale), deviation)))
    result = ops.add(normalized, ops.constant(np.repeat(shift, size, axis=1).reshape(1, channels, 1, 1)))
    joined.output(0).replace(result.output(0))


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


def integers(*values: int) -> Any:
    return ops.constant(np.array(values, np.int64))
