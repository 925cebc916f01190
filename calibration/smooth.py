"""SmoothQuant where it costs nothing at run time: large activation channels are divided out, their weights multiplied.

Xiao et al., "SmoothQuant", ICML 2023. The division disappears into what made the activation: the rows of the modulation table
(1 + scale, and shift), a LayerNorm's weights, or, in front of an attention's `proj`, the weights of the values. What the graphs
compute stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..runtime.manifest import ModelInfo
from .products import NETWORK, Graphs, Group
from .quantize import array, own
from .statistics import Statistic

Floats = NDArray[np.float32]

ALPHA = 0.7
LARGEST_FACTOR = 1000.0  # and its reciprocal the smallest: the modulation must fit into float16

# In a block's modulation: where the shift and the scale of the input of these layers lie.
SLOTS = {"attn.q": (0, 1), "attn.own_key": (0, 1), "attn.own_value": (0, 1), "attn.context_key": (2, 3), "attn.context_value": (2, 3)} | {
    "mlp.fc1": (5, 6)
}
# Layers of an attention. The exporter makes one of those with equal weights, as of zeros, and equal inputs.
KEYS_AND_VALUES = ("own_key", "own_value", "context_key", "context_value")
BEHIND_NORMS = ("prev_proj.mlp.fc1", "mlm_layer.fc", "mlm_layer.words")  # LayerNorms with weights of their own


@dataclass(frozen=True)
class Factors:
    """What the channels of a group's input are divided by."""

    group: Group
    values: Floats  # [channels]


def factors(graphs: Graphs, group: Group, statistic: Statistic, alpha: float = ALPHA) -> Factors | None:
    """max|X|^α / max|W|^(1−α), channel by channel, their geometric mean 1; None where nothing can take the division up."""
    if not foldable(group) or statistic.channel_max is None:
        return None
    layer = group.products[0].name
    if layer.endswith("attn.proj"):
        there = {node.name for node in graphs[group.graph].graph}
        if not all(f"{layer.removesuffix('proj')}{name}" in there for name in KEYS_AND_VALUES):
            return None
    weights = graphs[group.graph].graph.initializers
    rows = np.max([np.abs(array(weights[f"{product.name}.weight"])).max(1) for product in group.products], axis=0)
    inputs = statistic.channel_max.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = alpha * np.log(inputs) - (1 - alpha) * np.log(rows)
    usable = np.isfinite(logs)  # a channel that is never used is left alone
    if not usable.any():
        return None
    values = np.ones(len(rows), np.float32)
    values[usable] = np.clip(np.exp(logs[usable] - logs[usable].mean()), 1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return Factors(group, values)


def foldable(group: Group) -> bool:
    layers = [product.name for product in group.products]
    return group.graph in NETWORK and all(name in BEHIND_NORMS or name.endswith((*SLOTS, "attn.proj")) for name in layers)


def smooth(graphs: Graphs, chosen: list[Factors], model: ModelInfo) -> Graphs:
    """The same engine with the factors folded in. `graphs` are left as they are."""
    result = {name: graph.clone() if name in (*NETWORK, "condition") else graph for name, graph in graphs.items()}
    nodes = {name: {node.name: node for node in result[name].graph} for name in {one.group.graph for one in chosen}}
    changed: dict[ir.Value, Floats] = {}

    def edit(value: ir.Value) -> Floats:
        if value not in changed:
            changed[value] = array(value).copy()
        return changed[value]

    for one in chosen:
        graph, values = result[one.group.graph].graph, one.values
        consumers = [nodes[one.group.graph][product.name] for product in one.group.products]
        for node in consumers:
            edit(own(graph, node, 1))[...] *= values[:, None]
        layer = one.group.products[0].name
        if layer in BEHIND_NORMS:
            norm = layer_norm_before(consumers[0])
            for index in (1, 2):
                edit(own(graph, norm, index))[...] /= values
        elif layer.endswith("attn.proj"):
            for source in ("own_value", "context_value"):
                node = nodes[one.group.graph][f"{layer.removesuffix('proj')}{source}"]
                edit(own(graph, node, 1))[...] /= values  # [inputs, outputs]
                for user, index in node.outputs[0].uses():
                    other = user.inputs[1 - index] if user.op_type == "Add" else None
                    if other is not None and other.is_initializer():  # nothing is added to the context's values
                        edit(own(graph, user, 1 - index))[...] /= values
        else:
            _, number, *rest = layer.split(".")
            block = int(number) - (model.encoder_depth if one.group.graph == "decoder" else 0)
            table = edit(result["condition"].graph.initializers[f"{one.group.graph}_modulation_table"])  # [classes + 1, blocks, 8, dim]
            for slot in SLOTS[".".join(rest)]:
                table[:, block, slot] /= values
    for value, values in changed.items():
        value.const_value = ir.tensor(values, name=value.name)
    return result


def layer_norm_before(node: ir.Node) -> ir.Node:
    value = node.inputs[0]
    assert value is not None
    producer = value.producer()
    assert producer is not None and producer.op_type == "LayerNormalization"
    return producer
