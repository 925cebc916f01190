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
from .tapped import TappedBackend
from .trajectory import Floats, Trajectory, divergence, guided, replay

LEAST_SHARE = 0.9  # of the multiply-adds that are int8
NOTABLE = 0.1  # of the harm that all groups do, each alone: what does less is int8
PICTURE_ERROR = 255**2 / 10**3.5  # squared grey levels: 35 dB, below which pictures do not stay as they are


class SwitchedBackend(TappedBackend):
    """Graphs in which every group is quantized or not, as `on` says: one set of weights in memory for all measurements."""

    def __init__(self, manifest: Manifest, graphs: Graphs, groups: Sequence[Group], ranges: Ranges, weight_bits: int, folder: Path) -> None:
        super().__init__(manifest, quantize(graphs, groups, ranges, weight_bits, switched), folder)
        self.groups = groups
        self.recorded: list[Mapping[str, Tensor]] | None = None  # what the decoder is given, while it is asked for
        self.on(None)

    def on(self, chosen: Group | None) -> None:
        """Quantizes this group, and no other."""
        self.extra_inputs = {}
        for group in self.groups:
            self.extra_inputs.setdefault(group.graph, {})[switch_name(group)] = np.array(group is chosen)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        if graph == "decoder" and self.recorded is not None:
            self.recorded.append(inputs)
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
    backend: SwitchedBackend, manifest: Manifest, trajectories: Sequence[Trajectory], advance: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """The harm of every group alone, by its name.

    In the network: mean Kullback-Leibler divergence of the guided logits over all steps and masked positions, in nats; in the image
    decoder: mean squared error of the pictures, in squared grey levels.
    """
    totals = dict.fromkeys((group.name for group in backend.groups), 0.0)
    positions = sum(step.masked for step in trajectories[0].steps) * sum(len(one.labels) for one in trajectories)
    for one in trajectories:
        backend.on(None)
        backend.recorded = decoder_inputs = []
        reference = logits(backend, manifest, one)
        backend.recorded = None
        drawn = {"tokens": one.tokens, "positions": one.positions}
        pictures = backend.run("image_decoder", drawn)[0].astype(np.float32) if manifest.has("image_decoder.onnx") else None
        for group in backend.groups:
            backend.on(group)
            if group.graph == "image_decoder":
                assert pictures is not None
                found = backend.run("image_decoder", drawn)[0]
                totals[group.name] += float(((found - pictures) ** 2).mean()) / len(trajectories)
                advance()
                continue
            if group.graph == "decoder":  # what the encoder gave it stays as it was
                outputs = [backend.run("decoder", inputs)[0] for inputs in decoder_inputs]
                changed = [guided(output, step, len(one.labels)) for output, step in zip(outputs, one.steps, strict=True)]
            else:
                changed = logits(backend, manifest, one)
            totals[group.name] += sum(float(divergence(a, b).sum()) for a, b in zip(changed, reference, strict=True)) / positions
            advance()
        backend.on(None)
    return totals


def logits(backend: SwitchedBackend, manifest: Manifest, trajectory: Trajectory) -> list[Floats]:
    result: list[Floats] = []
    batch = len(trajectory.labels)
    replay(backend, manifest, trajectory, lambda step, values: result.append(guided(values, step, batch)))
    return result


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
