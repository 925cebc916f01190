"""A lane that runs changed graphs in place of an engine's own, and sees values inside them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from ..graph_file import save
from ..runtime.backends.onnxruntime_cpu import OnnxRuntimeLane, session_options
from ..runtime.backends.sessions import CPU, Sessions
from ..runtime.cores import allowed_threads
from ..runtime.manifest import Manifest
from ..runtime.progress import progress_bar
from .products import Graphs
from .trajectory import Trajectory, replay

Array = NDArray[Any]
Watch = Callable[[str, str, Array], None]  # (graph, value name, value)

PICTURES = 32  # they are alike inside the image decoder: a few tell enough


class TappedLane(OnnxRuntimeLane):
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
        replaced = set(graphs)

        def reading(graph: str) -> contextlib.AbstractContextManager[Path]:
            return contextlib.nullcontext(folder / f"{graph}.onnx") if graph in replaced else manifest.reading(graph)

        super().__init__(Sessions(reading, session_options(manifest, allowed_threads()), lambda graph: CPU))
        self.taps = dict(taps or {})
        self.watch = watch
        self.extra_inputs: dict[str, dict[str, Array]] = {}
        for name, model in graphs.items():
            save_with_outputs(model, folder / f"{name}.onnx", self.taps.get(name, ()))

    def close(self) -> None:
        self.sessions.close()

    def outputs(self, graph: str) -> list[str]:
        return [*super().outputs(graph), *self.taps.get(graph, ())]

    def run_once(self, graph: str, inputs: Mapping[str, Array]) -> Sequence[Array]:
        outputs = super().run_once(graph, {**inputs, **self.extra_inputs.get(graph, {})})
        names = self.taps.get(graph, ())
        own = len(outputs) - len(names)
        for name, value in zip(names, outputs[own:], strict=True):
            self.watch(graph, name, value)
        return outputs[:own]


def watch_runs(
    manifest: Manifest,
    graphs: Graphs,
    taps: Mapping[str, Sequence[str]],
    watch: Watch,
    trajectories: Sequence[Trajectory],
    scratch: Path,
    progress: bool,
) -> None:
    """Shows `watch` the tapped values along trajectories, those of the image decoder for PICTURES of them.

    graphs: the tapped ones, and those that are not the engine's own. scratch: a folder for copies of them.
    """
    pictures = PICTURES if "image_decoder" in taps else 0
    total = sum(len(one.labels) for one in trajectories)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=scratch))
        lane = stack.enter_context(contextlib.closing(TappedLane(manifest, graphs, Path(folder), taps, watch)))
        bar = stack.enter_context(progress_bar(total, "image", progress))
        for one in trajectories:
            replay(lane, manifest, one)
            if pictures > 0:
                lane.run("image_decoder", {"tokens": one.tokens[:pictures], "positions": one.positions[:pictures]})
                pictures -= len(one.labels)
            bar.update(len(one.labels))


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
