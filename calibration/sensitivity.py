"""How much harm each group of layers does when it alone is quantized, measured; and which stay in float for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..runtime.backends import Tensor
from ..runtime.manifest import Manifest
from .products import NETWORK, Graphs, Group
from .quantize import Ranges, describe, quantize
from .tapped import TappedLane
from .trajectory import Trajectory, divergence, guided, replayed_logits

LEAST_SHARE = 0.9  # of the multiply-adds that are int8
STEPS = 3  # at which harm is measured: the second, the last and the middle between
NOTABLE = 0.1  # of the harm that all groups do, each alone: what does less is int8
PICTURE_ERROR = 255**2 / 10**3.5  # squared grey levels: 35 dB, below which pictures do not stay as they are


class SwitchedLane(TappedLane):
    """Graphs in which every group is quantized or not, as `on` says: one set of weights in memory for all measurements."""

    def __init__(self, manifest: Manifest, graphs: Graphs, groups: Sequence[Group], ranges: Ranges, weight_bits: int, folder: Path) -> None:
        super().__init__(manifest, quantize(graphs, groups, ranges, weight_bits, switched), folder)
        self.groups = groups
        self.calls: dict[str, list[Mapping[str, Tensor]]] | None = None  # what each graph is given, while it is asked for
        self.on(None)

    def on(self, chosen: Group | None) -> None:
        """Quantizes this group, and no other."""
        self.extra_inputs = {}
        for group in self.groups:
            self.extra_inputs.setdefault(group.graph, {})[switch_name(group)] = np.array(group is chosen)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        if self.calls is not None:
            self.calls.setdefault(graph, []).append(inputs)
        return super().run(graph, inputs)


def switch_name(group: Group) -> str:
    return f"quantize:{group.input}"


def switched(graph: ir.Graph, group: Group, quantized: ir.Value, value: ir.Value) -> ir.Value:
    """Chooses by an input of the graph."""
    name = switch_name(group)
    flag = next((one for one in graph.inputs if one.name == name), None)
    if flag is None:
        flag = ir.Value(name=name, shape=ir.Shape(()), type=ir.TensorType(ir.DataType.BOOL))
        graph.inputs.append(flag)
    where = ir.node("Where", [flag, quantized, value], name=f"{quantized.name}_switch")
    describe(where, f"{quantized.name}_switched", value.shape, ir.DataType.FLOAT)
    producer = quantized.producer()
    assert producer is not None
    graph.insert_after(producer, where)
    return where.outputs[0]


def harms(
    lane: SwitchedLane, manifest: Manifest, trajectories: Sequence[Trajectory], advance: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """The harm of every group alone, by its name.

    In the network: mean Kullback-Leibler divergence of the guided logits over the masked positions of STEPS steps, in nats, each on the
    inputs that float32 gives; in the image decoder: mean squared error of the pictures, in squared grey levels.
    """
    totals = dict.fromkeys((group.name for group in lane.groups), 0.0)
    for one in trajectories:
        lane.on(None)
        calls: dict[str, list[Mapping[str, Tensor]]] = {}
        lane.calls = calls
        reference = replayed_logits(lane, manifest, one)
        drawn = {"tokens": one.tokens, "positions": one.positions}
        pictures = lane.run("image_decoder", drawn)[0].astype(np.float32) if manifest.has("image_decoder.onnx") else None
        lane.calls = None
        last = len(one.steps) - 1
        chosen = sorted({round(i) for i in np.linspace(min(1, last), last, STEPS)})
        positions = sum(one.steps[i].masked for i in chosen) * len(one.labels)
        for group in lane.groups:
            lane.on(group)
            if group.graph == "image_decoder":
                (found,) = lane.run("image_decoder", drawn)
                harm = float(((found - pictures) ** 2).mean())
            else:
                harm = 0.0
                for i in chosen:
                    inputs = dict(calls["decoder"][i])
                    if group.graph == "encoder":
                        (inputs["features"],) = lane.run("encoder", calls["encoder"][i - 1])
                    (logits,) = lane.run("decoder", inputs)
                    harm += float(divergence(guided(logits, one.steps[i], len(one.labels)), reference[i]).sum()) / positions
            totals[group.name] += harm / len(trajectories)
            advance()
        lane.on(None)
    return totals


def keep_float(groups: Sequence[Group], harm: Mapping[str, float], work: Mapping[str, int]) -> list[Group]:
    """The groups that hurt most: each at least NOTABLE of the whole harm, as long as LEAST_SHARE of the work stays int8.

    Once for the network and once for the image decoder, whose harms differ in kind; all of the image decoder where the rest would still
    change the pictures. harm, work (multiply-adds): of every group, by name.
    """
    kept = []
    pictures = [group for group in groups if group.graph not in NETWORK]
    for part in ([group for group in groups if group.graph in NETWORK], pictures):
        left = (1 - LEAST_SHARE) * sum(work[group.name] for group in part)
        least = NOTABLE * sum(harm[group.name] for group in part)
        for group in sorted(part, key=lambda group: -harm[group.name]):
            if harm[group.name] > least and work[group.name] <= left:
                kept.append(group)
                left -= work[group.name]
    if sum(harm[group.name] for group in pictures if group not in kept) > PICTURE_ERROR:
        kept += [group for group in pictures if group not in kept]
    return kept
