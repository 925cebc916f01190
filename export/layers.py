"""Where in the network an engine departs from its float32 original: the error of every layer's output."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..calibration.products import NETWORK, Product, find_products, load_graphs
from ..calibration.tapped import TappedLane
from ..calibration.trajectory import record, replay, spread_labels
from ..runtime.pipeline import Pipeline

# SmoothQuant scales the values inside an attention: they are not comparable, what comes out of `proj` is.
SCALED = ("own_value", "context_value")


IMAGES = 2  # one at a time: all layers' outputs are in memory


def layer_errors(
    engine: Pipeline, reference: Pipeline, seed: int = 0, classes: Sequence[int] | None = None, scratch: Path | None = None
) -> dict[str, float]:
    """The relative error of every product's output in the network, over all steps, on the CPU: by layer, in the network's order.

    scratch: a folder for copies of both networks; the system's by default, which may lie in memory.
    """
    labels = spread_labels(reference.manifest.model, IMAGES, classes and classes[:IMAGES])
    trajectories = record(reference, labels, seed, batch_size=1)
    wanted, found = watched(reference), watched(engine)
    layers = [name for name in wanted if name in found]
    sums = {name: np.zeros(2) for name in layers}
    with tempfile.TemporaryDirectory(dir=scratch) as folder, contextlib.ExitStack() as stack:
        lanes = []
        for number, (pipeline, products) in enumerate(((reference, wanted), (engine, found))):
            copies = Path(folder) / str(number)
            copies.mkdir()
            lane, seen = tapped(pipeline, [products[name] for name in layers], copies)
            stack.enter_context(contextlib.closing(lane))
            lanes.append((lane, seen))
        for trajectory in trajectories:
            outputs = []
            for (lane, seen), pipeline in zip(lanes, (reference, engine), strict=True):
                replay(lane, pipeline.manifest, trajectory)
                outputs.append(dict(seen))
                seen.clear()
            for name in layers:
                pairs = (outputs[1].get(place(found[name]), []), outputs[0].get(place(wanted[name]), []))  # none where no step got there
                for value, expected in zip(*pairs, strict=True):
                    sums[name] += ((value - expected).astype(np.float64) ** 2).sum(), (expected.astype(np.float64) ** 2).sum()
    return {name: float(np.sqrt(error / size)) for name, (error, size) in sums.items() if size}


def watched(pipeline: Pipeline) -> dict[str, Product]:
    products = find_products(load_graphs(pipeline.manifest, NETWORK))
    return {product.name: product for product in products if not product.name.endswith(SCALED)}


Seen = dict[tuple[str, str], list[NDArray[np.float32]]]  # (graph, value) → one array a step


def place(product: Product) -> tuple[str, str]:
    return product.graph, product.output


def tapped(pipeline: Pipeline, products: Sequence[Product], folder: Path) -> tuple[TappedLane, Seen]:
    """A lane that keeps the outputs of these products, in the order in which they come."""
    seen: Seen = {}

    def watch(graph: str, name: str, value: NDArray[Any]) -> None:
        seen.setdefault((graph, name), []).append(value.astype(np.float32))

    taps = {graph: [product.output for product in products if product.graph == graph] for graph in NETWORK}
    return TappedLane(pipeline.manifest, load_graphs(pipeline.manifest, NETWORK), folder, taps, watch), seen
