"""SmoothQuant where it costs nothing at run time: large activation channels are divided out, their weights multiplied.

Xiao et al., "SmoothQuant", ICML 2023. The division disappears into what made the activation: the rows of the modulation table
(1 + scale, and shift), a LayerNorm's weights, or, in front of an attention's `proj`, the weights of the values. What the graphs
compute stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..runtime.manifest import ModelInfo
from .products import NETWORK, Graphs, Group
from .statistics import Statistic

Floats = NDArray[np.float32]

ALPHA = 0.7
LARGEST_FACTOR = 1000.0  # and its reciprocal the smallest: the modulation must fit into float16

# In a block's modulation: where the shift and the scale of the input of these layers lie.
SLOTS = {"attn.q": (0, 1), "attn.own_key": (0, 1), "attn.own_value": (0, 1), "attn.context_key": (2, 3), "attn.context_value": (2, 3)} | {
    "mlp.fc1": (5, 6)
}
NORMS = {"prev_proj.mlp.fc1": "prev_proj.norm", "mlm_layer.fc": "norm", "mlm_layer.words": "mlm_layer.ln"}


@dataclass(frozen=True)
class Factors:
    """What the channels of a group's input are divided by."""

    group: Group
    values: Floats  # [channels]


def factors(graphs: Graphs, group: Group, statistic: Statistic, alpha: float = ALPHA) -> Factors | None:
    """max|X|^α / max|W|^(1−α), channel by channel, their geometric mean 1; None where nothing can take the division up."""
    if not foldable(group) or statistic.channel_max is None:
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
    return group.graph in NETWORK and all(name in NORMS or name.endswith((*SLOTS, "attn.proj")) for name in layers)


def smooth(graphs: Graphs, chosen: list[Factors], model: ModelInfo) -> Graphs:
    """The same engine with the factors folded in. `graphs` are left as they are."""
    changed: dict[tuple[str, str], Floats] = {}

    def edit(graph: str, name: str) -> Floats:
        if (graph, name) not in changed:
            changed[graph, name] = array(graphs[graph].graph.initializers[name]).copy()
        return changed[graph, name]

    for one in chosen:
        graph, values = one.group.graph, one.values
        for product in one.group.products:
            edit(graph, f"{product.name}.weight")[...] *= values[:, None]
        layer = one.group.products[0].name
        if layer in NORMS:
            for part in ("weight", "bias"):
                edit(graph, f"{NORMS[layer]}.{part}")[...] /= values
        elif layer.endswith("attn.proj"):
            constants = graphs[graph].graph.initializers
            for source in ("own_value", "context_value"):
                for part in ("weight", "bias"):  # [inputs, outputs] and [outputs]
                    name = f"{layer.removesuffix('proj')}{source}.{part}"
                    if name in constants:  # nothing is added to the context's values
                        edit(graph, name)[...] /= values
        else:
            _, number, *rest = layer.split(".")
            block = int(number) - (model.encoder_depth if graph == "decoder" else 0)
            table = edit("condition", f"{graph}_modulation_table")  # [classes + 1, blocks, 8, dim]
            for slot in SLOTS[".".join(rest)]:
                table[:, block, slot] /= values
    return {
        name: with_initializers(model_, {key: value for (graph, key), value in changed.items() if graph == name})
        for name, model_ in graphs.items()
    }


def array(value: ir.Value) -> Floats:
    assert value.const_value is not None
    return value.const_value.numpy()


def with_initializers(model: ir.Model, arrays: Mapping[str, Floats]) -> ir.Model:
    """A copy of a graph with other constants under the same names."""
    if not arrays:
        return model
    copy = model.clone()
    for name, values in arrays.items():
        copy.graph.initializers[name].const_value = ir.tensor(values, name=name)
    return copy
