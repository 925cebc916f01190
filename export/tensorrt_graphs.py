"""An engine's graphs in the form that TensorRT takes, computing the same values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..calibration.products import NETWORK
from ..calibration.quantize import ZERO_POINT, constant, describe
from ..graph_file import load, save, save_without_data
from ..runtime.manifest import Manifest
from ..runtime.pipeline import Pipeline
from .tables import condition_graph


@dataclass(frozen=True)
class Prepared:
    """A graph's file, and the graph beside which its external data lies: weights that an engine has are not written again."""

    path: Path
    data_of: Path

    def load(self) -> ir.Model:
        return load(self.path, self.data_of.parent)


def prepare(manifest: Manifest, graph: str, folder: Path) -> Prepared:
    """A graph for TensorRT: the engine's own where that is well, else a new one in `folder`.

    TensorRT quantizes to signed numbers around zero, and takes 8-bit numbers for nothing but products. It fuses an attention whose
    products and softmax have one type, and whose queries have as many rows as its keys; and gives names of its own to what a graph
    leaves out, which refitting then wants values for.
    """
    own = manifest.path(f"{graph}.onnx")
    path = folder / own.name
    if graph == "condition":
        if not any(node.op_type == "Cast" for node in load(own).graph):
            return Prepared(own, own)
        folder.mkdir(exist_ok=True)
        save(looked_up(manifest), path)
        return Prepared(path, path)
    model = load(own)
    signed = to_signed(model)
    if signed:
        dequantize_at_once(model)
    if graph in NETWORK:
        count_rows_once(model)
        exponentiate_narrow(model)
        name_biases(model)
    elif not signed:
        return Prepared(own, own)
    folder.mkdir(exist_ok=True)
    save_without_data(model, path, own.parent)
    return Prepared(path, own)


def looked_up(manifest: Manifest) -> ir.Model:
    """The condition graph with its tables in the engine's float type: what it gives for every label."""
    with Pipeline.load(manifest.folder) as pipeline, pipeline.backend.lease() as lane:
        encoder, decoder = lane.run("condition", {"labels": np.arange(manifest.model.num_classes + 1)})
    return condition_graph(encoder, decoder)


def to_signed(model: ir.Model) -> bool:
    """Turns unsigned quantization with zero point 128 into signed with 0; whether there was any.

    clip(round(x / s) + 128, 0, 255) − 128 = clip(round(x / s), −128, 127): no value changes.
    """
    found = False
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 3:
            continue
        zero = node.inputs[2]
        assert zero is not None and zero.const_value is not None
        if zero.const_value.dtype != ir.DataType.UINT8:
            continue
        levels = zero.const_value.numpy()
        assert (levels == ZERO_POINT).all()
        node.replace_input_with(2, signed_zero(model.graph, zero, levels.shape))
        for value in (node.inputs[0], node.outputs[0]):
            assert value is not None
            if value.dtype == ir.DataType.UINT8:
                value.type = ir.TensorType(ir.DataType.INT8)
        found = True
    for name in [name for name, value in model.graph.initializers.items() if not value.uses() and value.dtype == ir.DataType.UINT8]:
        del model.graph.initializers[name]
    return found


def dequantize_at_once(model: ir.Model) -> None:
    """Puts each DequantizeLinear right behind its QuantizeLinear: what is moved between the two in 8 bits is moved as floats."""
    graph = model.graph
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        moves: list[ir.Node] = []
        levels = node.inputs[0]
        while levels is not None and (producer := levels.producer()) is not None and producer.op_type != "QuantizeLinear":
            moves.append(producer)
            levels = producer.inputs[0]
        if not moves:
            continue
        assert levels is not None
        value, quantize = node.outputs[0], levels.producer()
        assert quantize is not None
        value.replace_all_uses_with(moves[0].outputs[0])
        moves[-1].replace_input_with(0, value)
        node.replace_input_with(0, levels)
        value.shape = levels.shape
        for move in moves:
            move.outputs[0].type = value.type
        graph.remove(node)
        graph.insert_after(quantize, node)


def signed_zero(graph: ir.Graph, zero: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    name = f"{zero.name}_signed"
    return graph.initializers.get(name) or constant(graph, name, np.zeros(shape, np.int8))


def count_rows_once(model: ir.Model) -> None:
    """Says of what is repeated for guidance, min(2 · batch, rows) rows, that it has as many as the modulation: so many are asked for."""
    least = [node for node in model.graph if node.op_type == "Min" and any(map(from_modulation, node.inputs))]
    cut = next((node for node in model.graph if node.op_type == "Slice" and from_modulation(node.inputs[2])), None)
    if cut is None or cut.outputs[0].shape is None:  # as a graph may say it that was not traced here
        return
    rows, repeated = cut.inputs[2], cut.outputs[0]
    assert rows is not None and repeated.shape is not None and repeated.dtype is not None
    rank, uses = len(repeated.shape), list(repeated.uses())
    others = ir.node("Shape", [repeated], {"start": 1})
    sizes = ir.node("Concat", [rows, others.outputs[0]], {"axis": 0})
    reshaped = ir.node("Reshape", [repeated, sizes.outputs[0]], {"allowzero": 1})
    describe(others, f"{repeated.name}_others", ir.Shape([rank - 1]), ir.DataType.INT64)
    describe(sizes, f"{repeated.name}_sizes", ir.Shape([rank]), ir.DataType.INT64)
    describe(reshaped, f"{repeated.name}_rows", ir.Shape(["rows", *repeated.shape[1:]]), repeated.dtype)
    model.graph.insert_after(cut, [others, sizes, reshaped])
    for user, index in uses:
        user.replace_input_with(index, reshaped.outputs[0])
    for node in least:
        number = next(value for value in node.inputs if from_modulation(value))
        assert number is not None
        node.outputs[0].replace_all_uses_with(number)
    RemoveUnusedNodesPass()(model)


def from_modulation(value: ir.Value | None) -> bool:
    """Whether a value is how many rows the modulation has, as a vector or a number."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Squeeze":
        return from_modulation(node.inputs[0])
    source = node.inputs[0] if node is not None and node.op_type == "Shape" else None
    return source is not None and str(source.name).endswith("_modulation")


def exponentiate_narrow(model: ir.Model) -> None:
    """Takes out the casts around the softmax between products in float16, which TensorRT sums up in float32 inside."""
    for node in [node for node in model.graph if node.op_type == "Softmax"]:
        wide, after = node.inputs[0], [user for user, _ in node.outputs[0].uses()]
        before = wide.producer() if wide is not None else None
        if wide is None or before is None or before.op_type != "Cast" or [user.op_type for user in after] != ["Cast"]:
            continue
        scores, narrow = before.inputs[0], after[0].outputs[0]
        if scores is None or scores.dtype != ir.DataType.FLOAT16 or narrow.dtype != ir.DataType.FLOAT16 or narrow.is_graph_output():
            continue
        node.replace_input_with(0, scores)
        node.outputs[0].type = scores.type
        narrow.replace_all_uses_with(node.outputs[0])
        model.graph.remove([after[0], *([] if wide.uses() else [before])], safe=True)


def name_biases(model: ir.Model) -> None:
    """Gives normalizations without a bias one of zeros."""
    for node in model.graph:
        scale = node.inputs[1] if node.op_type == "LayerNormalization" and len(node.inputs) == 2 else None
        if scale is not None and scale.const_value is not None:
            zeros = np.zeros_like(scale.const_value.numpy())
            name = f"no_bias_{zeros.size}_{zeros.dtype}"
            node.resize_inputs(3)
            node.replace_input_with(2, model.graph.initializers.get(name) or constant(model.graph, name, zeros))
