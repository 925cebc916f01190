"""An engine's graphs in the form that TensorRT takes, computing the same values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..calibration.quantize import ZERO_POINT, constant
from ..graph_file import save
from ..runtime.manifest import Manifest
from ..runtime.pipeline import Pipeline
from .tables import condition_graph


def prepare(manifest: Manifest, graph: str, folder: Path) -> Path:
    """A graph's file for TensorRT: the engine's own where that is well, else a new one in `folder`.

    TensorRT quantizes to signed numbers around zero, and takes 8-bit numbers for nothing but products.
    """
    path = manifest.path(f"{graph}.onnx")
    model = ir.load(path)
    if graph == "condition":
        if not any(node.op_type == "Cast" for node in model.graph):
            return path
        model = looked_up(manifest)
    elif to_signed(model):
        dequantize_at_once(model)
    else:
        return path
    folder.mkdir(exist_ok=True)
    save(model, folder / path.name)
    return folder / path.name


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
