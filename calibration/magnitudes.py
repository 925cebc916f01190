"""How large the values inside an engine's graphs get on its own runs: what float16 must hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..runtime.manifest import Manifest
from .products import GRAPHS, NETWORK, Graphs
from .quantize import constant, describe
from .tapped import watch_runs
from .trajectory import Trajectory


def magnitudes(
    manifest: Manifest, graphs: Graphs, trajectories: Sequence[Trajectory], scratch: Path, progress: bool = False
) -> dict[tuple[str, str], float]:
    """The largest magnitude of every float value inside the network and the image decoder, on these runs; of the modulation, for all
    classes: by (graph, value).
    """
    tables = graphs["condition"].graph.initializers
    largest = {(graph, f"{graph}_modulation"): magnitude(tables[f"{graph}_modulation_table"]) for graph in NETWORK}
    measured = {name: with_maxima(graphs[name]) for name in GRAPHS if name in graphs}
    names = {(graph, output): value for graph, (_, outputs) in measured.items() for output, value in outputs.items()}

    def watch(graph: str, output: str, found: NDArray[Any]) -> None:
        key = (graph, names[graph, output])
        # NaN must not get lost in a comparison.
        largest[key] = float(np.nan_to_num(np.maximum(largest.get(key, 0.0), found), nan=np.inf))

    taps = {graph: list(outputs) for graph, (_, outputs) in measured.items()}
    changed = {name: model for name, (model, _) in measured.items()} | {"condition": graphs["condition"]}
    watch_runs(manifest, changed, taps, watch, trajectories, scratch, progress)
    return largest


def magnitude(value: ir.Value) -> float:
    assert value.const_value is not None
    return float(np.nan_to_num(np.abs(value.const_value.numpy()).max(), nan=np.inf))


def with_maxima(model: ir.Model) -> tuple[ir.Model, dict[str, str]]:
    """A copy of a graph that measures its float values, and which value each of the new outputs measures."""
    model = model.clone()
    graph = model.graph
    flat = constant(graph, "measured_shape", np.array([-1], np.int64))
    zero = constant(graph, "measured_nothing", np.zeros(1, np.float32))  # a value may be empty
    outputs = {}
    inside = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *inside):
        if value.dtype != ir.DataType.FLOAT:
            continue
        name = f"{value.name}_magnitude"
        nodes = [ir.node("Abs", [value])]
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], flat]))
        nodes.append(ir.node("Concat", [nodes[-1].outputs[0], zero], {"axis": 0}))
        nodes.append(ir.node("ReduceMax", [nodes[-1].outputs[0]], {"keepdims": 0}))
        shapes = (value.shape, ir.Shape([None]), ir.Shape([None]), ir.Shape([]))
        for node, shape, suffix in zip(nodes, shapes, ("_abs", "_flat", "_all", ""), strict=True):
            describe(node, name + suffix, shape, ir.DataType.FLOAT)
        graph.extend(nodes)
        outputs[name] = str(value.name)
    return model, outputs
