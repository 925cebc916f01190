"""Graphs in forms that suit OpenVINO's CPU plugin better; what they compute stays the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino import Model
from openvino import opset13 as ops


def rewrite(model: Model, tiles: bool = False, bfloat16: bool = False, floats: bool = False, pictures: int | None = None) -> dict[str, str]:
    """Changes a graph of an engine in place. tiles: for AMX; bfloat16: to be computed in it; floats: what is in 8 bits is to be computed in
    floats; pictures: that it is given at a time, where it is always as many. Returns the settings that it must be compiled with.
    """
    if pictures:
        model.reshape({value.any_name: [pictures, *list(value.partial_shape)[1:]] for value in model.inputs})
    kinds = {node.get_type_name() for node in model.get_ordered_ops()}
    if kinds & {"MatMul", "Convolution"}:
        widen(model)  # and not the table of modulation, which would be twice as large
    # No list of all nodes is held beyond a loop: what fell out of the graph would live on, and be found among a value's readers.
    for node in model.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize":
            keep_output_float(node)
    model.validate_nodes_and_infer_types()
    for node in model.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize" and tiles:
            make_signed(node)
        elif node.get_type_name() == "MatMul":
            if floats:
                spell_out_weights(node)
            ease_attention(node, join=bfloat16)
        elif node.get_type_name() == "Parameter":
            spread_modulation(node)
        elif node.get_type_name() == "Transpose":
            join_shuffle(node)
        elif node.get_type_name() == "MVN":
            spell_out_group_norm(node)
        elif node.get_type_name() == "Convolution" and not tiles:
            pad_beforehand(node)
        elif node.get_type_name() == "Sigmoid" and not node.get_output_partial_shape(0).is_dynamic:
            spell_out_silu(node)
    left = {node.get_type_name() for node in model.get_ordered_ops()}
    # Without OpenVINO's 8-bit pass, products run as floats of 8 bits' values: slower, but right.
    return {"LP_TRANSFORMS_MODE": "NO"} if floats or left >= {"MVN", "Convolution", "FakeQuantize"} else {}


def widen(model: Model) -> None:
    """What is float16 becomes float32, but for inputs and outputs, as OpenVINO would have it later on: what follows knows graphs as they
    are then. Types are to be inferred anew."""
    nodes = model.get_ordered_ops()
    casts = [(node, element_type(node.input_value(0)), element_type(node.output(0))) for node in nodes if node.get_type_name() == "Convert"]
    results = [(node, element_type(node.input_value(0)), node.input_value(0).get_names()) for node in model.get_results()]
    for node, given, made in casts:
        if {given, made} == {"f16", "f32"}:
            redirect(node.output(0), node.input_value(0))
        elif made == "f16":
            redirect(node.output(0), ops.convert(node.input_value(0), "f32").output(0))
    for node in nodes:
        if node.get_type_name() == "Constant" and element_type(node.output(0)) == "f16":
            redirect(node.output(0), ops.constant(node.data.astype(np.float32)).output(0))
        elif node.get_type_name() == "Parameter" and element_type(node.output(0)) == "f16":
            wide = ops.convert(node, "f32")
            redirect(node.output(0), wide.output(0))
            wide.input(0).replace_source_output(node.output(0))
    for node, given, names in results:
        node.input_value(0).set_names(set())
        if given == "f16":
            node.input(0).replace_source_output(ops.convert(node.input_value(0), "f16").output(0))
        node.input_value(0).set_names(names)


def redirect(value: Any, other: Any) -> None:
    """Has other's value read where the first one was; names of outputs stay where they are."""
    for port in value.get_target_inputs():
        port.replace_source_output(other)


def element_type(value: Any) -> str:
    return str(value.get_element_type().get_type_name())


def ease_attention(scores: Any, join: bool = False) -> None:
    """Attention of own tokens to a context and to themselves, with less around what OpenVINO fuses of it. Keys are transposed as whole rows
    and read crosswise, in place of number by number. The shapes in which heads are apart and together are written in, not computed.

    join: keys and values by one product, those of the context and those of own tokens, and transposed at once. That makes fewer nodes, each
    of which takes some 10 µs when its shapes differ from those of the last run, as they do from step to step; in float32 copying them
    costs more than that.
    """
    attended = reader(reader(scores, "Softmax"), "MatMul")
    if attended is None or scores.get_attributes()["transpose_b"]:
        return
    transposed = [value.get_node() for value in (*scores.input_values(), attended.input_value(1))]
    if [order_of(node) for node in transposed] != [[0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]]:
        return
    split = [node.input_value(0).get_node() for node in transposed]
    widths = [list(node.get_output_partial_shape(0))[2:] for node in split]
    together = reader(reader(attended, "Transpose"), "Reshape")
    if {node.get_type_name() for node in split} != {"Reshape"} or together is None or together.output(0).get_partial_shape().rank != 3:
        return
    if any(width != widths[0] or any(dimension.is_dynamic for dimension in width) for width in widths):
        return
    heads, size = (dimension.get_length() for dimension in widths[0])

    def apart(features: Any) -> Any:
        return ops.transpose(ops.reshape(features, integers(0, 0, heads, size), special_zero=True), integers(0, 2, 1, 3))

    query, *sources = (node.input_value(0) for node in split)
    joined = joined_keys_and_values(sources, heads, size) if join else None
    keys, values = joined or map(apart, sources)
    attended.input(1).replace_source_output(values.output(0))
    scores.output(0).replace(ops.matmul(apart(query), keys, False, True).output(0))
    attended = ops.reshape(together.input_value(0), integers(0, 0, heads * size), special_zero=True)
    quantized = reader(together, "FakeQuantize") is not None
    together.output(0).replace((limit(attended, heads * size) if quantized else attended).output(0))


def joined_keys_and_values(sources: list[Any], heads: int, size: int) -> list[Any] | None:
    """Keys and values, [rows, heads, tokens, size] each; None where they are not made as expected."""
    concatenations = [value.get_node() for value in sources]
    if any(node.get_type_name() != "Concat" or node.get_attributes()["axis"] != 1 for node in concatenations):
        return None
    pairs = zip(*(node.input_values() for node in concatenations), strict=True)
    products = [joined_product(key, value) for key, value in pairs]
    if any(product is None for product in products):
        return None
    # [rows, tokens, 2, heads, size] → [2, rows, heads, tokens, size]: keys and values are taken from it where they lie.
    apart = ops.reshape(ops.concat(products, 1), integers(0, 0, 2, heads, size), special_zero=True)
    parts = ops.transpose(apart, integers(2, 0, 3, 1, 4))
    return [ops.gather(parts, ops.constant(np.int64(part)), integers(0)) for part in (0, 1)]


def joined_product(first: Any, second: Any) -> Any:
    """Two products of the same features with constant weights, their biases added or not, as one; None where they are not such."""
    nodes = [value.get_node() for value in (first, second)]
    kinds = {node.get_type_name() for node in nodes}
    if kinds == {"Add"}:
        of_product = [[node.input_value(port).get_node().get_type_name() == "MatMul" for port in (0, 1)] for node in nodes]
        if not all(any(ports) for ports in of_product):
            return None
        product = joined_product(*(node.input_value(ports.index(True)) for node, ports in zip(nodes, of_product, strict=True)))
        bias = joined_constant(*(node.input_value(ports.index(False)) for node, ports in zip(nodes, of_product, strict=True)))
        return ops.add(product, bias) if product is not None and bias is not None else None
    if kinds != {"MatMul"} or nodes[0].input_value(0) != nodes[1].input_value(0):
        return None
    weights = joined_constant(*(node.input_value(1) for node in nodes))
    if weights is None or any(node.get_attributes()[name] for node in nodes for name in ("transpose_a", "transpose_b")):
        return None
    return ops.matmul(nodes[0].input_value(0), weights, False, False)


def joined_constant(first: Any, second: Any) -> Any:
    """Two constants joined along the last axis, with what is computed from them: a type, a shape, scales. None where that differs."""
    nodes = [value.get_node() for value in (first, second)]
    kinds = {node.get_type_name() for node in nodes}
    if kinds == {"Constant"}:
        return ops.constant(np.concatenate([np.array(node.data) for node in nodes], -1))
    if kinds == {"Reshape"}:
        constants = [constant_behind(value) for value in (first, second)]
        shapes = [list(value.get_shape()) for value in (first, second)]
        if any(constant is None for constant in constants):
            return None
        return ops.constant(np.concatenate([c.reshape(s) for c, s in zip(constants, shapes, strict=True) if c is not None], -1))
    if kinds == {"Convert"}:
        inside = joined_constant(*(node.input_value(0) for node in nodes))
        return ops.convert(inside, nodes[0].get_output_element_type(0).get_type_name()) if inside is not None else None
    if kinds == {"Multiply"}:
        factors = [joined_constant(*(node.input_value(port) for node in nodes)) for port in (0, 1)]
        return ops.multiply(*factors) if all(factor is not None for factor in factors) else None
    return None


def spell_out_weights(product: Any) -> None:
    """A product's 8-bit weights as floats. OpenVINO would make them so as it multiplies, and round differently from batch to batch."""
    scaled = product.input_value(1).get_node()
    widened = scaled.input_value(0).get_node() if scaled.get_type_name() == "Multiply" else None
    if widened is None or widened.get_type_name() != "Convert":
        return
    levels, scale = constant_behind(widened.input_value(0)), constant_behind(scaled.input_value(1))
    if levels is not None and scale is not None:
        weights = levels.astype(np.float32) * scale.reshape(list(scaled.input_value(1).get_shape()))
        scaled.output(0).replace(ops.constant(weights).output(0))


def order_of(node: Any) -> list[int] | None:
    """In which a Transpose has its input's axes; None of other nodes."""
    order = constant_behind(node.input_value(1)) if node.get_type_name() == "Transpose" else None
    return None if order is None else list(order.tolist())


def spread_modulation(parameter: Any) -> None:
    """The modulation of all blocks is taken apart at once, and not block by block and vector by vector, for which OpenVINO has a dozen
    nodes a block that copy a few thousand numbers each: [rows, blocks, vectors, dim] → scales and gates, by a Split of each kind.

    Shifts are gathered one by one: OpenVINO joins no Add that reads a Split with what is before it, and scaling, shifting and
    quantizing would pass over the features twice. Gates are apart from scales since in bfloat16 they alone meet float32.
    """
    shape = list(parameter.get_output_partial_shape(0))
    source = reader(parameter, "Convert") or parameter
    readers = [port.get_node() for port in source.output(0).get_target_inputs()]
    gathers = [node for node in readers if node.get_type_name() == "Gather"]
    if len(shape) != 4 or any(dimension.is_dynamic for dimension in shape[1:]):
        return
    blocks, dim = shape[1].get_length(), shape[3].get_length()
    kinds: dict[str, list[tuple[int, int, Any]]] = {"shift": [], "scale": [], "gate": []}
    for gather in gathers:
        index, split = constant_behind(gather.input_value(1)), reader(gather, "Split")
        if index is not None and split is not None:
            for vector, output in enumerate(split.outputs()):
                kinds[kind_of_modulation(output)].append((int(index), vector, output))
    for kind, outputs in kinds.items():
        vectors = sorted({vector for _, vector, _ in outputs})
        count = blocks * len(vectors)
        if not vectors:
            continue
        chosen = ops.reshape(ops.gather(source, integers(*vectors), integers(2)), integers(0, count, dim), special_zero=True)
        parts = ops.split(chosen, ops.constant(np.int64(1)), count) if kind != "shift" else None
        for block, vector, output in outputs:
            place = block * len(vectors) + vectors.index(vector)
            output.replace(parts.output(place) if parts else ops.gather(chosen, integers(place), integers(1)).output(0))


def kind_of_modulation(vector: Any) -> str:
    """What is added is a shift, what normalized features are multiplied by before that, a scale; what outputs of layers are, a gate."""
    for port in vector.get_target_inputs():
        node = port.get_node()
        addition = reader(node, "Add")
        if node.get_type_name() == "Add":
            return "shift"
        if addition is not None and addition.input_value(1).get_node().get_type_name() == "Split":
            return "scale"
    return "gate"


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


def keep_output_float(quantize: Any) -> None:
    """What a convolution gives is left as it is, unless another convolution reads it: to be 8 bits in between suits ONNX Runtime, which
    convolves in 8 bits only so. OpenVINO would pass over the features once more to make floats of them, and they lose digits.
    """
    if convolution_behind(quantize.input_value(0)) is None:
        return
    narrowed = reader(quantize, "Convert")
    widened = narrowed
    while widened is not None and (widened is narrowed or widened.get_type_name() != "Convert"):  # past what moves the 8-bit values
        widened = reader(widened)
    dequantized = reader(reader(widened, "Subtract"), "Multiply")
    if dequantized is None or any(port.get_node().get_type_name() == "Convolution" for port in dequantized.output(0).get_target_inputs()):
        return
    # A limit that is never met: where sums and means read a convolution's output itself, OpenVINO's 8-bit pass takes the scales of
    # its weights through them, wrongly (16 dB in place of 44).
    largest = float(np.finfo(np.float32).max)
    narrowed.output(0).replace(ops.clamp(quantize.input_value(0), -largest, largest).output(0))
    dequantized.output(0).replace(widened.input_value(0))


def limit(value: Any, width: int) -> Any:
    """The same features, [rows, tokens, width], as a node that quantizing is joined with: by itself OpenVINO makes float32 of bfloat16
    first, and quantizes after that. A limit of each channel that is never met, since one limit for all would be moved to what is before, or
    fall away.
    """
    return ops.maximum(value, ops.constant(np.full((1, 1, width), np.finfo(np.float32).min, np.float32)))


def pad_beforehand(convolution: Any) -> None:
    """The zeros around what is convolved by 2×2 taps are put there before it is quantized: where rows of its output are longer than 128
    numbers, oneDNN's kernel without AMX takes 1.8 times as long if it has to see to them.
    """
    attributes = convolution.get_attributes()
    pads = attributes["pads_begin"]
    shape = convolution.input_value(1).get_shape()
    quantize = quantize_behind(convolution.input_value(0))
    if list(shape)[2:] != [2, 2] or pads != attributes["pads_end"] or not any(pads) or quantize is None:
        return
    padded = ops.pad(quantize.input_value(0), integers(0, 0, *pads), integers(0, 0, *pads), "constant", ops.constant(np.float32(0)))
    quantize.input(0).replace_source_output(padded.output(0))
    given = [convolution.input_value(port) for port in (0, 1)]
    bare = ops.convolution(*given, attributes["strides"], [0, 0], [0, 0], attributes["dilations"])
    bare.set_friendly_name(convolution.get_friendly_name())
    convolution.output(0).replace(bare.output(0))


def spell_out_silu(sigmoid: Any) -> None:
    """x · sigmoid(x) as x / (1 + exp(−x)), which OpenVINO computes faster than by its kernel for the former: where all shapes are known
    beforehand, in one pass with what scales, shifts and quantizes, and elsewhere in two.
    """
    x = sigmoid.input_value(0)
    for port in sigmoid.output(0).get_target_inputs():
        product = port.get_node()
        if product.get_type_name() == "Multiply" and product.input_value(1 - port.get_index()) == x:
            one = ops.constant(np.float32(1))
            exponential = ops.exp(ops.multiply(x, ops.constant(np.float32(-1))))  # a Negative would have it recognized
            product.output(0).replace(ops.divide(x, ops.add(exponential, one)).output(0))


def quantize_behind(value: Any) -> Any:
    """What quantizes a value that nothing else reads; None where it is float."""
    for kind in ("Multiply", "Subtract", "Convert", "Convert", "FakeQuantize"):
        node = value.get_node()
        if node.get_type_name() != kind or len(node.output(0).get_target_inputs()) != 1:
            return None
        value = node.input_value(0)
    return node


def make_signed(quantize: Any) -> None:
    """Features of 0 to 255 around 128 as −128 to 127 around 0: the same numbers. AMX multiplies them as they are; of unsigned ones, what
    128 adds to each sum has to be taken off again.
    """
    low, high = (constant_behind(quantize.input_value(port)) for port in (3, 4))
    narrowed = reader(quantize, "Convert")
    shifted = reader(reader(narrowed, "Convert"), "Subtract")
    zero = shifted.input_value(1).get_node() if shifted is not None else None
    zero_point = constant_behind(zero.input_value(0)) if zero is not None and zero.get_type_name() == "Convert" else None
    if low is None or high is None or zero_point is None or (low != 0).any() or (high != 255).any() or (zero_point != 128).any():
        return
    given = [quantize.input_value(port) for port in range(3)]
    levels = ops.fake_quantize(*given, ops.constant(low - low.dtype.type(128)), ops.constant(high - high.dtype.type(128)), 256)
    shifted.output(0).replace(ops.convert(ops.convert(levels, "i8"), shifted.get_output_element_type(0).get_type_name()).output(0))


def spell_out_group_norm(normalization: Any) -> None:
    """GroupNorm, which ONNX graphs have as reshape → InstanceNormalization → reshape, and the factors and offsets of each channel behind
    it, as x · a + b with a and b of each channel.

    OpenVINO's 8-bit pass moves the scales of 8-bit values through an MVN as if it had no epsilon: wrong pictures where features are
    small. Written so it also needs no change of layout, and passes over the features three times: for the mean, for that of the squared
    differences from it, and to scale them. (E[x²] - E[x]² has no digits left in bfloat16.)
    """
    split, scaled = normalization.input_value(0).get_node(), reader(normalization, "Multiply")
    shifted = reader(scaled, "Add")
    joined = reader(shifted, "Reshape")
    multiplied = reader(joined, "Multiply")
    last = reader(multiplied, "Add")
    if split.get_type_name() != "Reshape" or last is None:
        return
    x = split.input_value(0)
    shape = x.get_partial_shape()
    if shape.rank.get_length() != 4 or any(dimension.is_dynamic for dimension in list(shape)[1:]):
        return
    channels = list(shape)[1].get_length()
    groups = split.output(0).get_partial_shape()[1].get_length()
    behind = [constant_behind(node.input_value(1)) for node in (scaled, shifted, multiplied, last)]
    constants = [constant.astype(np.float32).ravel() for constant in behind if constant is not None]
    if [constant.size for constant in constants] != [groups, groups, channels, channels]:
        return
    scale, shift, weight, bias = (np.repeat(c, channels // c.size).reshape(1, channels, 1, 1) for c in constants)
    size, epsilon = channels // groups, normalization.get_attributes()["eps"]
    averages = ops.constant(np.kron(np.eye(groups), np.full((size, size), 1 / size)).astype(np.float32)[..., None, None])

    def group_means(features: Any) -> Any:
        """[batch, channels, 1, 1], the same for all channels of a group. As a convolution, which keeps the features' layout."""
        means = ops.reduce_mean(features, integers(2, 3), keep_dims=True)
        return ops.convolution(means, averages, [1, 1], [0, 0], [0, 0], [1, 1])

    mean = group_means(x)
    variance = group_means(ops.squared_difference(x, mean))
    factor = ops.divide(ops.constant(scale * weight), ops.sqrt(ops.add(variance, scalar(epsilon))))
    offset = ops.subtract(ops.constant(shift * weight + bias), ops.multiply(mean, factor))
    last.output(0).replace(ops.add(ops.multiply(x, factor), offset).output(0))


def convolution_behind(value: Any) -> Any:
    """The convolution that a value comes from, its bias added or not; None where it comes from something else."""
    node = value.get_node()
    if node.get_type_name() == "Add":
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Convolution" else None


def reader(node: Any, kind: str = "") -> Any:
    """The node, of a kind if one is named, that computes with a node's output; None where there is not exactly one."""
    targets = node.output(0).get_target_inputs() if node is not None else []
    readers = [target.get_node() for target in targets if target.get_index() == 0]
    found = [one for one in readers if kind in ("", one.get_type_name())]
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
