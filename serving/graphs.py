"""An engine's graphs as Triton models of their own, for services that run the loop themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..runtime.builds import Build, changed_graph, read_builds
from ..runtime.command import needs
from ..runtime.manifest import Manifest
from .config import Word

TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}

Port = tuple[str, str, list[int]]  # name, type, dimensions with -1 where they are free; none for a scalar


def ports(manifest: Manifest, modulation: dict[str, list[int]]) -> dict[str, tuple[list[Port], list[Port]]]:
    """Inputs and outputs of every graph by the engine contract (docs/ENGINE.md)."""
    model, real = manifest.model, manifest.float_type
    tokens, positions = ("tokens", "int64", [-1, -1]), ("positions", "int64", [-1, -1])
    all_tokens, all_positions = ((name, kind, [-1, model.length]) for name, kind, _ in (tokens, positions))
    encoder, decoder = ((name, real, [-1, *modulation[name]]) for name in ("encoder_modulation", "decoder_modulation"))
    features = ("features", real, [-1, -1, model.dim])
    logits = ("logits", "float32", [-1, -1, model.codes])
    noise: list[Port] = [(name, "float32", [-1, model.length]) for name in ("choice_noise", "confidence_noise")]
    numbers: list[Port] = [(name, "float32", []) for name in ("guidance", "sampling_temperature", "mask_temperature")]
    chosen: list[Port] = [(name, "int64", [-1, -1]) for name in ("tokens", "revealed_tokens", "revealed_positions", "masked_positions")]
    result: dict[str, tuple[list[Port], list[Port]]] = {
        "condition": ([("labels", "int64", [-1])], [encoder, decoder]),
        "encoder": ([tokens, positions, features, encoder], [("visible_features", real, [-1, -1, model.dim])]),
        "decoder": ([positions, features, decoder], [logits]),
        "sampler": ([logits, positions, *noise, *numbers, ("keep", "int64", [])], chosen),
    }
    size = model.image_size
    if size is not None:
        images: Port = ("images", "uint8", [-1, size, size, 3])
        result["image_decoder"] = ([all_tokens, all_positions], [images])
        result["image_encoder"] = ([images], [all_tokens])
    return {name: both for name, both in result.items() if manifest.has(f"{name}.onnx")}


def graph_configs(manifest: Manifest, name: str, gpus: Sequence[int]) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """For every graph a model `<name>_<graph>`: its config, and its files (in the version folder → in the engine directory).

    On GPUs with a TensorRT build of these graphs, weights included, the plans are served, else the graphs by ONNX Runtime; the sampler
    always so, since Triton's TensorRT backend takes no scalars.
    """
    builds = [build for build in read_builds(manifest) if servable(build, manifest)] if gpus else []
    result = {}
    for graph, (inputs, outputs) in ports(manifest, modulation_dims(manifest)).items():
        scalars = not all(dims for _, _, dims in inputs)
        build = builds[-1] if builds and graph in builds[-1].graphs and not scalars else None
        result[f"{name}_{graph}"] = (config(f"{name}_{graph}", graph, inputs, outputs, build, gpus), files(manifest, graph, build))
    return result


def servable(build: Build, manifest: Manifest) -> bool:
    return changed_graph(build, manifest) is None and all(graph.weights is None for graph in build.graphs.values())


def modulation_dims(manifest: Manifest) -> dict[str, list[int]]:
    """Dimensions of the modulation beyond its rows, which are the condition graph's own affair."""
    with needs("cpu", "--graphs"):
        import onnxruntime as ort

        from ..runtime.backends.sessions import CPU, Sessions
    options = ort.SessionOptions()
    options.log_severity_level = 4
    sessions = Sessions(manifest.reading, options, lambda graph: CPU)
    return {output.name: list(output.shape[1:]) for output in sessions.get("condition").get_outputs()}


def files(manifest: Manifest, graph: str, build: Build | None) -> dict[str, str]:
    if build:
        return {"model.plan": build.plan(graph)}
    # Graphs name their external data, so only the graph itself is renamed.
    return {("model.onnx" if name == f"{graph}.onnx" else name): name for name in manifest.files_of(graph)}


def config(name: str, graph: str, inputs: list[Port], outputs: list[Port], build: Build | None, gpus: Sequence[int]) -> dict[str, Any]:
    instances = {
        "count": 1,
        "kind": Word("KIND_GPU" if gpus else "KIND_CPU"),
        "gpus": list(gpus) or None,
        # Without them Triton takes the first profile alone, which is that of one step.
        "profile": [str(index) for index in range(len(build.graphs[graph].profiles))] if build else None,
    }
    return {
        "name": name,
        "platform": "tensorrt_plan" if build else "onnxruntime_onnx",
        "max_batch_size": 0,  # batch and rows are axes of the contract
        "input": [tensor(*port) for port in inputs],
        "output": [tensor(*port) for port in outputs],
        "instance_group": [instances],
    }


def tensor(name: str, kind: str, dims: list[int]) -> dict[str, Any]:
    """Triton knows no scalars: its ONNX Runtime backend makes one of a single number."""
    return {"name": name, "data_type": Word(TYPES[kind]), "dims": dims or [1]}
