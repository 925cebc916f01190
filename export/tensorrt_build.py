"""TensorRT plans of an engine's graphs, put beside them; the manifest lists the builds."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..calibration.products import fixed
from ..errors import EngineError, ExportError, InputError, reason
from ..graph_file import load
from ..runtime.backends.cuda import device_index, use_device
from ..runtime.backends.tensorrt import platform_of, start_runtime
from ..runtime.builds import (
    BACKEND,
    FOLDER,
    SECTION,
    Build,
    BuiltGraph,
    Platform,
    Shape,
    changed_graph,
    graph_source,
    read_builds,
    unsuited,
)
from ..runtime.files import WholeFile, replace_folder
from ..runtime.manifest import FILE, Manifest, check_file, manifest_text, read_manifest, sha256, source_hash
from ..runtime.profiles import graph_profiles
from ..runtime.progress import Report
from . import tables, tensorrt_graphs, tensorrt_plan
from .tensorrt_graphs import prepare
from .tensorrt_options import Options
from .tensorrt_plan import built, refitted

if sys.platform != "win32":
    import fcntl


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
    Raises InputError, BackendError, ExportError; the engine stays as it was until all is written.
    """
    index = use_device(device)  # TensorRT builds on the current one
    start_runtime()
    manifest = read_manifest(engine)
    options = Options(tuple(steps) or (manifest.sampling.steps,), **settings)
    here = platform_of(index)
    wanted = describe(manifest, here, options)
    for found in read_builds(manifest):
        if found.id == wanted.id and not force:
            try:
                for name, entry in found.files.items():
                    check_file(manifest, name, entry, verify=True)
            except EngineError as error:
                report(f"built again: {error}")
                break
            report(f"already built: {found.folder}")
            put_last(manifest, found)
            return found
    source = refittable_build(refit, here, wanted) if refit else None
    try:
        (engine / FOLDER).mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=engine / FOLDER) as partial:
            folder = Path(partial) / "plans"
            folder.mkdir()
            graphs = {}
            for graph, described in wanted.graphs.items():
                report(graph)
                prepared = prepare(manifest, graph, folder / "graphs")
                if source:
                    old, build = source
                    earlier = build.plan(graph)
                    with old.unchanged({earlier: build.files[earlier]}, verify=True):
                        plan = refitted(old.root / earlier, prepare(old, graph, folder.parent / "old graphs"), prepared)
                else:
                    plan = built(prepared, described.profiles, options, timing_cache, progress)
                (folder / f"{graph}.plan").write_bytes(plan)
                name = prepared.path.name
                kept = name if prepared.path == manifest.path(name) else f"{wanted.folder}/graphs/{name}"
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
    form = source_hash(tensorrt_graphs, tables, tensorrt_plan)  # what makes plans of graphs
    return Build(here, asdict(options) | lists | {"form": form}, graphs, {})


def modulation_shapes(manifest: Manifest) -> dict[str, Shape]:
    """Shapes of the condition's outputs beyond their first axis, read off the graph."""
    outputs = load(manifest.path("condition.onnx")).graph.outputs
    return {str(output.name): tuple(map(fixed, list(output.shape or ())[1:])) for output in outputs}


def refittable_build(engine: Path, here: Platform, wanted: Build) -> tuple[Manifest, Build]:
    """Another engine and its build whose plans can take weights like the wanted one's. Raises InputError."""
    manifest = read_manifest(engine)
    for build in reversed(read_builds(manifest)):
        same_options = {**build.options, "weights": None} == {**wanted.options, "weights": None}
        if (
            build.options["weights"] == "refittable"
            and same_options
            and build.profiles == wanted.profiles
            and unsuited(build, manifest, here) is None
        ):
            return manifest, build
    raise InputError(f"{engine}: has no build with these options to refit; expected one made with --weights refittable")


@contextlib.contextmanager
def alone(manifest: Manifest) -> Iterator[Manifest]:
    """The manifest as it is now, while no other process changes its list of builds (where the file system has locks). Raises ExportError
    where another engine is in its place."""
    with contextlib.ExitStack() as stack:
        if sys.platform != "win32":
            handle = os.open(manifest.folder / FOLDER, os.O_RDONLY)
            stack.callback(os.close, handle)
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        now = read_manifest(manifest.folder)
        if now.hash != manifest.hash:
            raise ExportError(f"{manifest.folder}: was replaced while its plans were built; build them again")
        yield now


def put_last(manifest: Manifest, build: Build) -> None:
    """Lists a build behind the others: of those that suit, the last one is taken."""
    with alone(manifest) as now:
        builds = read_builds(now)
        if build in builds[:-1]:
            write_builds(now, [*(one for one in builds if one != build), build])


def put_in_manifest(manifest: Manifest, build: Build, folder: Path) -> Build:
    """Moves a finished build into the engine and lists it; builds that no longer suit the graphs are taken off."""
    engine = manifest.folder
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        f"{build.folder}/{path.relative_to(folder).as_posix()}": {"size": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }
    build = replace(build, files=files)
    with alone(manifest) as now:  # others may have built meanwhile
        others = [one for one in read_builds(now) if one.id != build.id]
        current = [one for one in others if changed_graph(one, now) is None]
        place, old = engine / build.folder, folder.parent / "old"
        replace_folder(place, folder, old)
        try:
            write_builds(now, [*current, build])
        except BaseException:
            if not is_listed(build, engine):
                if old.exists():
                    replace_folder(place, old, folder)
                else:
                    place.rename(folder)
            raise
    for one in others:
        if one not in current:
            shutil.rmtree(engine / one.folder, ignore_errors=True)
    return build


def is_listed(build: Build, engine: Path) -> bool:
    """Whether an engine's manifest lists the very files of a build."""
    return any(one.get("files") == build.files for one in json.loads((engine / FILE).read_bytes()).get(SECTION, []))


def write_builds(manifest: Manifest, builds: Sequence[Build]) -> None:
    """Lists these builds in an engine's manifest, in this order, in place of those that it lists, but for other programs'."""
    content = json.loads((manifest.folder / FILE).read_bytes())
    others = [entry for entry in content.get(SECTION, []) if isinstance(entry, dict) and entry.get("backend") != BACKEND]
    content[SECTION] = [*others, *(one.as_json() for one in builds)]
    with WholeFile(manifest.folder / FILE) as partial:
        partial.write_bytes(manifest_text(content))
