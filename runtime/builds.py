"""TensorRT builds of an engine: what the manifest says of them, whether one suits a device, and which profile covers a request."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import EngineError
from .manifest import FILE, Manifest, check_file

SECTION = "builds"
FOLDER = BACKEND = "tensorrt"
HARDWARE = ("this", "same", "ampere+")  # GPUs that a build serves: its own model, its compute capability, all from Ampere on

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]  # input → least, best and largest shape; of `keep`, which is a number, its values


@dataclass(frozen=True)
class Platform:
    """What TensorRT's plans are made for. capability: compute capability, "9.0"."""

    tensorrt: str
    device: str
    capability: str

    def __str__(self) -> str:
        return f"{self.device} (compute capability {self.capability}) with TensorRT {self.tensorrt}"


@dataclass(frozen=True)
class BuiltGraph:
    """One graph's plan. source: hashes of the graph's files. weights: for a plan without weights, the graph to take them from."""

    source: str
    profiles: tuple[Profile, ...]
    weights: str | None = None


@dataclass(frozen=True)
class Build:
    """One build of an engine. `files`: path in the engine directory → size and sha256."""

    platform: Platform
    options: Mapping[str, Any]
    graphs: Mapping[str, BuiltGraph]
    files: Mapping[str, dict[str, Any]]

    @property
    def id(self) -> str:
        """What the build is made from, as a hash: where any of it differs it is another build."""
        content = {
            "platform": asdict(self.platform),
            "options": dict(self.options),
            "graphs": {name: {"source": graph.source, "profiles": graph.profiles} for name, graph in self.graphs.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def profiles(self) -> dict[str, tuple[Profile, ...]]:
        return {name: graph.profiles for name, graph in self.graphs.items()}

    @property
    def folder(self) -> str:
        return f"{FOLDER}/{self.id}"

    def plan(self, graph: str) -> str:
        return f"{self.folder}/{graph}.plan"

    def weights_of(self, graph: str, manifest: Manifest) -> dict[str, Any]:
        """The files that hold the weights of a plan that has none."""
        source = self.graphs[graph].weights
        assert source is not None
        own = {name: entry for name, entry in self.files.items() if name.startswith(source)}
        return own if self.data_of(graph) in own else own | {name: manifest.files[name] for name in manifest.files_of(graph)}

    def data_of(self, graph: str) -> str:
        """The graph beside which the external data of these weights lies: the one that they are taken from, or the engine's own."""
        source = self.graphs[graph].weights
        return source if source is not None and f"{source}.data" in self.files else f"{graph}.onnx"

    def as_json(self) -> dict[str, Any]:
        return {"backend": BACKEND, "id": self.id, **asdict(self)}


def graph_source(manifest: Manifest, graph: str) -> str:
    """A hash of all files of a graph, its external data included."""
    own = {name: manifest.files[name]["sha256"] for name in manifest.files_of(graph)}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def read_builds(manifest: Manifest) -> list[Build]:
    """The TensorRT builds that an engine's manifest lists. Raises EngineError for entries that are damaged."""
    result = []
    for number, entry in enumerate(manifest.builds):
        if isinstance(entry, dict) and entry.get("backend") != BACKEND:
            continue
        try:
            if not all(isinstance(value, str) for value in entry["platform"].values()):
                raise TypeError(f"its platform is {entry['platform']!r:.200}")
            build = Build(
                platform=Platform(**entry["platform"]),
                options=dict(entry["options"]),
                graphs={
                    name: BuiltGraph(graph["source"], tuple(map(read_profile, graph["profiles"])), graph["weights"])
                    for name, graph in entry["graphs"].items()
                },
                files=dict(entry["files"]),
            )
            whole = build.id == entry["id"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(f"{manifest.folder / FILE}: {SECTION}[{number}] is damaged ({type(error).__name__}: {error})") from error
        if not whole:
            raise EngineError(f"{manifest.folder / FILE}: {SECTION}[{number}] has id {entry['id']!r}, expected {build.id!r}")
        result.append(build)
    return result


def read_profile(profile: Mapping[str, Sequence[Sequence[int]]]) -> Profile:
    result = {}
    for name, shapes in profile.items():
        least, best, most = (tuple(map(int, shape)) for shape in shapes)
        result[name] = (least, best, most)
    return result


def changed_graph(build: Build, manifest: Manifest) -> str | None:
    """A graph that is not the one that was built any more; None where all are."""
    return next((name for name, graph in build.graphs.items() if graph.source != graph_source(manifest, name)), None)


def unsuited(build: Build, manifest: Manifest, here: Platform) -> str | None:
    """Why a build cannot serve this engine here; None where it can."""
    changed = changed_graph(build, manifest)
    if changed:
        return f"{changed}.onnx has changed since it was built"
    theirs, options = build.platform, build.options
    numbers, built = (version_numbers(platform.tensorrt) for platform in (here, theirs))
    compatible = options.get("version_compatible") and numbers[:1] == built[:1] and numbers >= built
    if theirs.tensorrt != here.tensorrt and not compatible:
        return f"built with TensorRT {theirs.tensorrt}, this is {here.tensorrt}"
    hardware = options.get("hardware", "this")
    if hardware == "this" and (theirs.device, theirs.capability) != (here.device, here.capability):
        return f"built for {theirs.device}, this is {here.device}"
    if hardware == "same" and theirs.capability != here.capability:
        return f"built for compute capability {theirs.capability}, this is {here.capability}"
    if hardware == "ampere+" and float(here.capability) < 8:
        return f"built for compute capability 8.0 and later, this is {here.capability}"
    return None


def version_numbers(version: str) -> list[int]:
    """10.16.1.11 and 10.16.1rc1 → 10, 16, 1."""
    return [int(number) for number in re.findall(r"\d+", version, re.ASCII)[:3]]


def choose_build(manifest: Manifest, here: Platform) -> Build:
    """The latest build that suits; its files are checked, and shall be again when they are read. Raises EngineError with the reason and
    the command where there is none."""
    builds = read_builds(manifest)
    command = f"build it: enat-export --engine {manifest.folder} --tensorrt"
    if not builds:
        raise EngineError(f"{manifest.folder}: this engine has no TensorRT build; {command}")
    reasons = [unsuited(build, manifest, here) for build in builds]
    suited = [build for build, reason in zip(builds, reasons) if reason is None]
    if not suited:
        raise EngineError(f"{manifest.folder}: no TensorRT build suits {here}: {'; '.join(dict.fromkeys(map(str, reasons)))}; {command}")
    chosen = suited[-1]
    missing = {chosen.plan(graph) for graph in chosen.graphs} - chosen.files.keys()
    missing |= {graph.weights for graph in chosen.graphs.values() if graph.weights is not None} - {*manifest.files, *chosen.files}
    if missing:
        raise EngineError(f"{manifest.folder / FILE}: the build {chosen.id} needs {min(missing)!r}, which is not listed")
    for name, entry in chosen.files.items():
        check_file(manifest, name, entry, verify=False)
    return chosen


def covering_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int | None:
    """The first profile that all shapes lie within; the exact ones come first."""
    for index, profile in enumerate(profiles):
        if all(within(shapes[name], least, most) for name, (least, _, most) in profile.items()):
            return index
    return None


def within(shape: Shape, least: Shape, most: Shape) -> bool:
    return len(shape) == len(least) and all(low <= size <= high for size, low, high in zip(shape, least, most))
