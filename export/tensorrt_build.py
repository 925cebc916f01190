"""TensorRT plans of an engine's graphs, built with Polygraphy and put beside them; the manifest lists the builds.

Networks are strongly typed: precision is what the graphs say (docs/PRECISION.md), and no builder flag changes it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tensorrt as trt
from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath
from polygraphy.backend.trt import Profile as PolygraphyProfile
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from ..calibration.products import fixed
from ..errors import EngineError, ExportError, InputError, reason
from ..runtime.backends.cuda import device_index, use_device
from ..runtime.backends.tensorrt import Logger, load_plan, platform_of, refit
from ..runtime.builds import (
    FOLDER,
    HARDWARE,
    SECTION,
    Build,
    BuiltGraph,
    Platform,
    Profile,
    Shape,
    changed_graph,
    graph_source,
    read_builds,
    unsuited,
)
from ..runtime.files import WholeFile
from ..runtime.manifest import FILE, Manifest, check_file, manifest_text, read_manifest, sha256, source_hash
from ..runtime.progress import Report
from . import tensorrt_graphs
from .profiles import graph_profiles
from .progress_monitor import ProgressMonitor
from .tensorrt_graphs import prepare

WEIGHTS = ("included", "refittable", "stripped")
FAULTY_REFIT = "11.3."  # "may produce incorrect numerical output": NVIDIA, TensorRT 11.3.0, Refitting an Engine


@dataclass(frozen=True)
class Options:
    """What a build is made for.

    steps: numbers of sampling steps whose shapes get profiles of their own. max_batch: images at once, at
    most. best_batch: those that the build is tuned for, the smallest first; each has profiles of its own, for what lies above the one
    before. weights: in the plans ("included"), there and exchangeable ("refittable"), or taken from the graphs at load ("stripped").
    hardware: the GPUs that the plans serve: this model, the same compute capability, or all from Ampere on. version_compatible: with
    later TensorRT of the same major version too. tf32: 10 bits of float32's 23 in products. level: 0 (quick to build) to 5 (fast).
    """

    steps: tuple[int, ...]
    max_batch: int = 16
    best_batch: tuple[int, ...] = (1,)
    weights: str = "included"
    hardware: str = "this"
    version_compatible: bool = False
    tf32: bool = False
    level: int = 3

    def __post_init__(self) -> None:
        for name, value, allowed in (("weights", self.weights, WEIGHTS), ("hardware", self.hardware, HARDWARE)):
            if value not in allowed:
                raise InputError(f"unknown {name} {value!r}; expected {', '.join(allowed)}")
        if not 0 <= self.level <= 5:
            raise InputError(f"expected an optimization level of 0 to 5, got {self.level}")
        bests = self.best_batch
        if not bests or list(bests) != sorted(set(bests)) or not 1 <= bests[0] <= bests[-1] <= self.max_batch:
            found = ",".join(map(str, bests))
            raise InputError(f"expected best batches of 1 to the largest, {self.max_batch}, the smallest first, got {found}")
        if self.version_compatible and self.weights != "included":
            raise InputError(
                f"--version-compatible goes with --weights included, not {self.weights}: the runtime in such plans takes no weights"
            )
        if self.weights == "refittable" and trt.__version__.startswith(FAULTY_REFIT):
            raise InputError(
                f"TensorRT {trt.__version__}: refittable plans may compute wrongly (a known issue of that release); "
                "expected --weights stripped or included, or another TensorRT"
            )

    @property
    def batches(self) -> list[tuple[int, int, int]]:
        """Ranges of images at once, (least, best, most): up to each best batch, and the last one up to the largest."""
        firsts, mosts = (1, *(best + 1 for best in self.best_batch[:-1])), (*self.best_batch[:-1], self.max_batch)
        return list(zip(firsts, self.best_batch, mosts))


def check_options(device: str = "cuda:0", timing_cache: Path | None = None, refit: Path | None = None, **options: Any) -> None:
    """Raises what `build_engine` would raise for a machine without a GPU or for wrong options, before there is an engine."""
    Options((), **options)
    for path in (timing_cache, refit):
        if path and path.is_dir() == (path is timing_cache):
            raise InputError(f"{path}: expected {'a file' if path is timing_cache else 'an engine directory'}")
    device_index(device)


def build_engine(
    engine: Path,
    steps: Sequence[int] = (),
    device: str = "cuda:0",
    timing_cache: Path | None = None,
    refit: Path | None = None,
    force: bool = False,
    report: Report = lambda line: None,
    progress: bool = False,
    **settings: Any,
) -> Build:
    """Builds TensorRT plans for an engine on a GPU and lists them in its manifest. Returns the build.

    steps: as in Options, the engine's own number without one; settings: its other fields. timing_cache: a file that makes later
    builds faster. refit: an engine of the same sizes with a refittable build, whose plans get this engine's weights in place of a
    new build. A build of the same graphs, TensorRT, device and options is used as it is unless `force`.
    Raises InputError, ExportError; the engine stays as it was until all is written.
    """
    index = use_device(device)  # TensorRT builds on the current one
    manifest = read_manifest(engine)
    options = Options(tuple(steps) or (manifest.sampling.steps,), **settings)
    here = platform_of(index)
    wanted = describe(manifest, here, options)
    builds = read_builds(manifest)
    for found in builds:
        if found.id == wanted.id and not force:
            try:
                for name, entry in found.files.items():
                    check_file(manifest, name, entry, verify=True)
            except EngineError as error:
                report(f"built again: {error}")
                break
            report(f"already built: {found.folder}")
            if found != builds[-1]:  # of those that suit, the last one is taken
                write_builds(manifest, [*(one for one in builds if one != found), found])
            return found
    source = refittable_build(refit, here, wanted) if refit else None
    try:
        (engine / FOLDER).mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=engine / FOLDER) as name:
            folder = Path(name) / "plans"
            folder.mkdir()
            graphs = {}
            for graph, described in wanted.graphs.items():
                report(graph)
                path = prepare(manifest, graph, folder / "graphs")
                if source:
                    plan = refitted(source / f"{graph}.plan", path)
                else:
                    plan = built(path, described.profiles, options, timing_cache, progress)
                (folder / f"{graph}.plan").write_bytes(plan)
                kept = path.name if path.parent == manifest.root else f"{wanted.folder}/graphs/{path.name}"
                graphs[graph] = BuiltGraph(described.source, described.profiles, kept if options.weights == "stripped" else None)
                report(f"  {len(described.profiles)} profiles, {len(plan) / 2**20:.0f} MiB")
            if options.weights != "stripped":
                shutil.rmtree(folder / "graphs", ignore_errors=True)
            return put_in_manifest(manifest, Build(here, wanted.options, graphs, {}), folder)
    except OSError as error:
        raise ExportError(f"{engine}: not built: {reason(error)}") from error


def describe(manifest: Manifest, here: Platform, options: Options) -> Build:
    """What a build with these options is to be: its profiles, and what it depends on."""
    profiles = graph_profiles(manifest, options.steps, options.batches, modulation_shapes(manifest))
    graphs = {name: BuiltGraph(graph_source(manifest, name), tuple(own)) for name, own in profiles.items()}
    lists = {"steps": list(options.steps), "best_batch": list(options.best_batch)}
    return Build(here, asdict(options) | lists | {"form": source_hash(tensorrt_graphs)}, graphs, {})


def modulation_shapes(manifest: Manifest) -> dict[str, Shape]:
    """Shapes of the condition's outputs beyond their first axis, read off the graph."""
    outputs = ir.load(manifest.path("condition.onnx")).graph.outputs
    return {str(output.name): tuple(map(fixed, list(output.shape or ())[1:])) for output in outputs}


def built(path: Path, profiles: Sequence[Profile], options: Options, timing_cache: Path | None, progress: bool) -> bytes:
    """A graph's plan. Raises ExportError with TensorRT's reason."""
    compatibility = {
        "this": trt.HardwareCompatibilityLevel.NONE,
        "same": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        "ampere+": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }
    cache = str(timing_cache) if timing_cache else None
    monitor = ProgressMonitor(path.stem) if progress else None
    try:
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            network = NetworkFromOnnxPath(str(path), strongly_typed=True)
            config = CreateConfig(
                tf32=options.tf32,
                profiles=[polygraphy_profile(profile) for profile in profiles],
                load_timing_cache=cache if timing_cache and timing_cache.is_file() else None,
                refittable=options.weights == "refittable",
                strip_plan=options.weights == "stripped",
                builder_optimization_level=options.level,
                hardware_compatibility_level=compatibility[options.hardware],
                version_compatible=options.version_compatible,
                progress_monitor=monitor,
            )
            plan = EngineBytesFromNetwork(network, config=config, save_timing_cache=cache)()
    except PolygraphyException as error:
        if monitor and monitor.interrupted:
            raise KeyboardInterrupt from error
        raise ExportError(f"{path.name}: TensorRT {trt.__version__} cannot build it: {str(error).strip().splitlines()[0]}") from error
    return bytes(memoryview(plan))


def polygraphy_profile(profile: Profile) -> Any:
    result = PolygraphyProfile()
    for name, (least, best, most) in profile.items():
        result.add(name, min=least, opt=best, max=most)
    return result


def refittable_build(engine: Path, here: Platform, wanted: Build) -> Path:
    """The folder of another engine's build whose plans can take weights like the wanted one's. Raises InputError."""
    manifest = read_manifest(engine)
    for build in reversed(read_builds(manifest)):
        same_options = {**build.options, "weights": None} == {**wanted.options, "weights": None}
        if (
            build.options["weights"] == "refittable"
            and same_options
            and build.profiles == wanted.profiles
            and unsuited(build, manifest, here) is None
        ):
            return engine / build.folder
    raise InputError(f"{engine}: has no build with these options to refit; expected one made with --weights refittable")


def refitted(plan: Path, graph: Path) -> bytes:
    """A plan with the weights of another graph."""
    logger = Logger()
    engine = load_plan(trt.Runtime(logger), plan, logger)
    refit(engine, graph, logger)
    config = engine.create_serialization_config()
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)  # so that it takes the next weights, too
    return bytes(memoryview(engine.serialize_with_config(config)))


def put_in_manifest(manifest: Manifest, build: Build, folder: Path) -> Build:
    """Moves a finished build into the engine and lists it; builds that no longer suit the graphs are taken off."""
    engine = manifest.folder
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        f"{build.folder}/{path.relative_to(folder).as_posix()}": {"size": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }
    build = replace(build, files=files)
    now = read_manifest(engine)  # others may have built meanwhile
    if now.hash != manifest.hash:
        raise ExportError(f"{engine}: was replaced while its plans were built; build them again")
    others = [one for one in read_builds(now) if one.id != build.id]
    current = [one for one in others if changed_graph(one, now) is None]
    place = engine / build.folder
    if place.exists():
        place.rename(folder.parent / "old")
    folder.rename(place)
    write_builds(now, [*current, build])
    for one in others:
        if one not in current:
            shutil.rmtree(engine / one.folder, ignore_errors=True)
    return build


def write_builds(manifest: Manifest, builds: Sequence[Build]) -> None:
    """Lists these builds in an engine's manifest, in this order, in place of those that it lists."""
    content = json.loads((manifest.folder / FILE).read_text("utf-8"))
    content[SECTION] = [one.as_json() for one in builds]
    with WholeFile(manifest.folder / FILE) as partial:
        partial.write_bytes(manifest_text(content))
