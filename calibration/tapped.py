"""A backend that runs changed graphs in place of an engine's own, and sees values inside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from ..graph_file import save
from ..runtime.backends.onnxruntime_cpu import OnnxRuntimeBackend
from ..runtime.manifest import Manifest
from .products import Graphs

Array = NDArray[Any]
Watch = Callable[[str, str, Array], None]  # (graph, value name, value)


class TappedBackend(OnnxRuntimeBackend):
    """ONNX Runtime on graphs that are written to `folder`: `watch` gets every value named in `taps`, graph by graph.

    Graphs that are not given are the engine's own. extra_inputs: what changed graphs ask for beyond the contract, by name.
    """

    def __init__(
        self,
        manifest: Manifest,
        graphs: Graphs,
        folder: Path,
        taps: Mapping[str, Sequence[str]] | None = None,
        watch: Watch = lambda graph, name, value: None,
    ) -> None:
        super().__init__(manifest, "cpu", None)
        self.folder = folder
        self.replaced = set(graphs)
        self.taps = dict(taps or {})
        self.watch = watch
        self.extra_inputs: dict[str, dict[str, Array]] = {}
        for name, model in graphs.items():
            save_with_outputs(model, folder / f"{name}.onnx", self.taps.get(name, ()))

    def path(self, graph: str) -> Path:
        return self.folder / f"{graph}.onnx" if graph in self.replaced else super().path(graph)

    def run(self, graph: str, inputs: Mapping[str, Array]) -> Sequence[Array]:
        outputs = super().run(graph, {**inputs, **self.extra_inputs.get(graph, {})})
        names = self.taps.get(graph, ())
        own = len(outputs) - len(names)
        for name, value in zip(names, outputs[own:], strict=True):
            self.watch(graph, name, value)
        return outputs[:own]


def save_with_outputs(model: ir.Model, path: Path, names: Sequence[str]) -> None:
    """Writes a graph with values inside it as outputs behind its own; the model stays as it was."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    own = list(model.graph.outputs)
    model.graph.outputs.extend(values[name] for name in names)
    try:
        save(model, path)
    finally:
        model.graph.outputs.clear()
        model.graph.outputs.extend(own)
