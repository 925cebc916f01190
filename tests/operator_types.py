"""Do a graph's operators and types stand in a table: operator → types of its first input, and for Cast of the output too?"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx
from onnx import TensorProto


def with_types(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The graph with all shapes, and the type of every value ("FLOAT", …)."""
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return model, {name: TensorProto.DataType.Name(number) for name, number in types.items()}


def not_in_table(node: onnx.NodeProto, types: Mapping[str, str], table: Mapping[str, Collection[str]]) -> list[str]:
    """What of a node the table does not have, one line each."""
    where = f"{node.op_type} {node.output[0]}"
    if node.op_type not in table or node.domain:
        return [f"{where}: no such operator"]
    checked = [node.input[0], *([node.output[0]] if node.op_type == "Cast" else [])]
    return [f"{where}: {types[name]} {name}" for name in checked if types[name] not in table[node.op_type]]
