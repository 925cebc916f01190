"""TensorRT without a GPU: builds as values, and code that uses the API against what its bindings document."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import invoke, modulation
from host_device import HostDevice, lanes_made
from tensorrt_operators import objections
from tensorrt_stand_in import StandIn, import_tensorrt, signatures

from enat import Pipeline
from enat.calibration.calibrate import Settings
from enat.errors import BackendError, EngineError, ExportError, InputError
from enat.export.convert import Precision, convert_engine
from enat.export.profiles import graph_profiles
from enat.runtime.builds import Build, BuiltGraph, Platform, choose_build, graph_source, read_builds, unsuited
from enat.runtime.cli import main as run_main
from enat.runtime.manifest import Manifest, read_manifest
from enat.serving.graphs import graph_configs

HERE = Platform("10.16.1.11", "NVIDIA H200", "9.0")
GRAPHS = ("condition", "encoder", "decoder", "sampler", "image_decoder", "image_encoder")


# Builds as values


def make_build(manifest: Manifest, platform: Platform = HERE, **options: Any) -> Build:
    profiles = graph_profiles(manifest, [8], [(1, 1, 4)], modulation(manifest))
    graphs = {name: BuiltGraph(graph_source(manifest, name), tuple(own)) for name, own in profiles.items()}
    return Build(platform, {"steps": [8], "max_batch": 4, "weights": "included", **options}, graphs, {})


def listed(engine: Path, *builds: Build) -> Manifest:
    """The engine with builds in its manifest, and plans of nothing."""
    from enat.export.tensorrt_build import put_in_manifest

    for build in builds:
        folder = engine / "tensorrt" / ".partial" / "plans"
        folder.mkdir(parents=True)
        for graph in build.graphs:
            (folder / f"{graph}.plan").write_bytes(f"{build.id} {graph}".encode())
        put_in_manifest(read_manifest(engine), build, folder)
        shutil.rmtree(folder.parent)
    return read_manifest(engine, verify=True)


def test_an_engine_tells_of_its_builds(trt: Any, engine_copy: Path) -> None:
    listed(engine_copy, make_build(read_manifest(engine_copy)))
    shown = invoke(run_main, "--engine", engine_copy, "--info").stdout.splitlines()[-1]
    assert shown == 'build     TensorRT 10.16.1.11, NVIDIA H200 (9.0), {"steps": [8], "max_batch": 4}'
    (build,) = json.loads(invoke(run_main, "--engine", engine_copy, "--info", "--json").stdout)["builds"]
    assert build["device"] == "NVIDIA H200" and build["options"]["weights"] == "included"


@pytest.fixture
def trt() -> Any:
    return import_tensorrt()


def test_builds_are_in_the_manifest(trt: Any, engine_copy: Path) -> None:
    before = read_manifest(engine_copy)
    one, other = make_build(before), make_build(before, hardware="same")
    after = listed(engine_copy, one, other, one)
    assert after.hash == before.hash  # the engine is what it was
    assert after.files == before.files
    assert [build.id for build in read_builds(after)] == [other.id, one.id]
    for build in read_builds(after):
        assert build.graphs == one.graphs
        assert set(build.files) == {f"tensorrt/{build.id}/{graph}.plan" for graph in GRAPHS}
    assert sorted(path.name for path in (engine_copy / "tensorrt").iterdir()) == sorted((one.id, other.id))


def test_the_key_of_a_build(manifest: Manifest) -> None:
    """Whatever a plan depends on makes another build."""
    base = make_build(manifest)
    assert base.id == make_build(manifest).id
    source = dataclasses.replace(base.graphs["encoder"], source="0" * 64)
    shorter = dataclasses.replace(base.graphs["encoder"], profiles=base.graphs["encoder"].profiles[1:])
    others = [
        *(make_build(manifest, dataclasses.replace(HERE, **{name: "1.2.3"})) for name in ("tensorrt", "device", "capability")),
        make_build(manifest, max_batch=8),
        make_build(manifest, tf32=True),
        dataclasses.replace(base, graphs={**base.graphs, "encoder": source}),
        dataclasses.replace(base, graphs={**base.graphs, "encoder": shorter}),
    ]
    assert len({base.id, *(build.id for build in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    "built, options, reason",
    [
        (HERE, {}, None),
        (dataclasses.replace(HERE, tensorrt="10.13.3.9"), {}, "built with TensorRT 10.13.3.9, this is 10.16.1.11"),
        (dataclasses.replace(HERE, tensorrt="10.13.3.9"), {"version_compatible": True}, None),
        (dataclasses.replace(HERE, tensorrt="10.17.0.1"), {"version_compatible": True}, "built with TensorRT 10.17.0.1"),
        (dataclasses.replace(HERE, tensorrt="9.9.0.1"), {"version_compatible": True}, "built with TensorRT 9.9.0.1"),
        (dataclasses.replace(HERE, device="NVIDIA H100"), {}, "built for NVIDIA H100, this is NVIDIA H200"),
        (dataclasses.replace(HERE, device="NVIDIA H100"), {"hardware": "same"}, None),
        (dataclasses.replace(HERE, device="NVIDIA L4", capability="8.9"), {"hardware": "same"}, "compute capability 8.9, this is 9.0"),
        (dataclasses.replace(HERE, device="NVIDIA L4", capability="8.9"), {"hardware": "ampere+"}, None),
    ],
)
def test_where_a_build_runs(manifest: Manifest, built: Platform, options: dict[str, Any], reason: str | None) -> None:
    found = unsuited(make_build(manifest, built, **options), manifest, HERE)
    assert found is None if reason is None else reason in str(found)


def test_a_build_is_chosen_or_refused_with_the_reason(trt: Any, engine_copy: Path) -> None:
    manifest = read_manifest(engine_copy)
    with pytest.raises(EngineError, match=r"has no TensorRT build; build it: enat-export --engine .* --tensorrt"):
        choose_build(manifest, HERE)
    elsewhere = make_build(manifest, dataclasses.replace(HERE, device="NVIDIA L4", capability="8.9"))
    manifest = listed(engine_copy, elsewhere)
    with pytest.raises(EngineError, match=r"no TensorRT build suits NVIDIA H200 .*: built for NVIDIA L4, this is NVIDIA H200; build it"):
        choose_build(manifest, HERE)
    manifest = listed(engine_copy, make_build(manifest, max_batch=2), make_build(manifest, max_batch=3))
    chosen = choose_build(manifest, HERE)
    assert chosen.options["max_batch"] == 3
    (engine_copy / chosen.plan("encoder")).write_bytes(b"damaged")
    with pytest.raises(EngineError, match=r"encoder\.plan: 7 bytes, expected"):
        choose_build(manifest, HERE)


def test_plans_that_are_not_listed_are_not_loaded(trt: Any, engine_copy: Path) -> None:
    manifest = listed(engine_copy, make_build(read_manifest(engine_copy)))
    (entry,) = manifest.builds
    plan = entry["files"].pop(f"tensorrt/{entry['id']}/encoder.plan")
    with pytest.raises(EngineError, match=r"needs 'tensorrt/.*/encoder\.plan', which is not listed"):
        choose_build(manifest, HERE)
    entry["files"][f"tensorrt/{entry['id']}/encoder.plan"] = plan
    entry["graphs"]["encoder"]["weights"] = "../elsewhere.onnx"
    with pytest.raises(EngineError, match=r"needs '\.\./elsewhere\.onnx', which is not listed"):
        choose_build(manifest, HERE)


def test_triton_serves_plans_with_all_their_profiles(trt: Any, engine_copy: Path) -> None:
    build = make_build(read_manifest(engine_copy))
    configs = graph_configs(listed(engine_copy, build), "enat", (1,))
    for graph, profiles in build.profiles.items():
        config, files = configs[f"enat_{graph}"]
        assert files == {"model.plan": build.plan(graph)} and config["platform"] == "tensorrt_plan"
        (group,) = config["instance_group"]
        assert group["profile"] == [str(i) for i in range(len(profiles))] and group["gpus"] == [1]
    stripped = {name: dataclasses.replace(graph, weights=f"{name}.onnx") for name, graph in build.graphs.items()}
    manifest = listed(engine_copy, dataclasses.replace(build, options={"weights": "stripped"}, graphs=stripped))
    (config, files) = graph_configs(manifest, "enat", (0,))["enat_encoder"]
    assert files == {"model.plan": build.plan("encoder")}  # the one that has its weights
    manifest = dataclasses.replace(manifest, builds=manifest.builds[1:])
    (config, files) = graph_configs(manifest, "enat", (0,))["enat_encoder"]
    assert config["platform"] == "onnxruntime_onnx" and "model.onnx" in files


def test_a_build_of_other_graphs_is_not_used(trt: Any, engine_copy: Path) -> None:
    """The plans of an encoder that has changed since: refused, and removed when the engine is built anew."""
    manifest = listed(engine_copy, make_build(read_manifest(engine_copy)))
    entry = {**manifest.files["encoder.onnx"], "sha256": "0" * 64}
    changed = dataclasses.replace(manifest, files={**manifest.files, "encoder.onnx": entry})
    with pytest.raises(EngineError, match=r"encoder\.onnx has changed since it was built"):
        choose_build(changed, HERE)


@pytest.mark.parametrize("key, value", [("id", "0" * 16), ("platform", {}), ("graphs", 3), ("files", None)])
def test_damaged_entries(trt: Any, engine_copy: Path, key: str, value: object) -> None:
    manifest = listed(engine_copy, make_build(read_manifest(engine_copy)))
    manifest.builds[0][key] = value
    with pytest.raises(EngineError, match=r"manifest\.json: builds\[0\]"):
        choose_build(manifest, HERE)


# The API, against the real bindings


def onnx_network(trt: Any, path: Path) -> StandIn:
    """The network that TensorRT's parser would make, as far as its inputs go."""
    inputs = []
    for port in onnx.load(path).graph.input:
        shape = tuple(dim.dim_value or (-1 if dim.dim_param else 0) for dim in port.type.tensor_type.shape.dim)
        inputs.append(StandIn(trt.ITensor, name=port.name, shape=shape, is_shape_tensor=port.name == "keep", dtype=trt.float32))
    return StandIn(trt.INetworkDefinition, num_inputs=len(inputs), num_outputs=0, num_layers=0, get_input=lambda index: inputs[index])


class Builds:
    """Stand-ins for what makes plans: what they were asked is kept."""

    def __init__(self, trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trt = trt
        self.profiles: list[StandIn] = []
        self.configs: list[StandIn] = []
        self.networks: list[StandIn] = []
        self.builders: list[StandIn] = []
        self.failing = False
        monkeypatch.setattr(trt, "Builder", self.builder)
        monkeypatch.setattr(trt, "OnnxParser", self.parser)
        monkeypatch.setattr("enat.export.tensorrt_build.use_device", lambda device: 0)
        monkeypatch.setattr("enat.export.tensorrt_build.platform_of", lambda index: HERE)

    def builder(self, logger: Any) -> StandIn:
        cls = type(self).real_builder
        found = StandIn(
            cls,
            create_network=self.network,
            create_builder_config=self.config,
            create_optimization_profile=self.profile,
            build_serialized_network=lambda network, config: None if self.failing else f"plan {len(self.configs)}".encode(),
            logger=logger,
        )
        self.builders.append(found)
        return found

    real_builder: Any = None

    def network(self, flags: int = 0) -> StandIn:
        self.networks.append(StandIn(self.trt.INetworkDefinition, num_inputs=0, num_outputs=0))
        return self.networks[-1]

    def config(self) -> StandIn:
        defaults: dict[str, Any] = {"DLA_core": -1, "get_memory_pool_limit": 0, "get_tactic_sources": 0, "num_optimization_profiles": 0}
        self.configs.append(StandIn(self.trt.IBuilderConfig, create_timing_cache=lambda data: StandIn(self.trt.ITimingCache), **defaults))
        return self.configs[-1]

    def profile(self) -> StandIn:
        self.profiles.append(StandIn(self.trt.IOptimizationProfile))
        return self.profiles[-1]

    def parser(self, network: StandIn, logger: Any) -> StandIn:
        def parse(path: str) -> bool:
            network.__dict__.update(onnx_network(self.trt, Path(path)).__dict__)
            return True

        return StandIn(Builds.real_parser, parse_from_file=parse, num_errors=0)

    real_parser: Any = None


@pytest.fixture
def builds(trt: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Builds]:
    if not hasattr(trt, "OnnxParser"):
        pytest.skip("these bindings have no ONNX parser")
    Builds.real_builder, Builds.real_parser = trt.Builder, trt.OnnxParser
    yield Builds(trt, monkeypatch)


def test_building_asks_tensorrt_for_what_was_meant(builds: Builds, engine_copy: Path, tmp_path: Path) -> None:
    from enat.export.tensorrt_build import build_engine

    trt = builds.trt
    lines: list[str] = []
    manifest = read_manifest(engine_copy)
    build = build_engine(engine_copy, [8], max_batch=4, best_batch=(2,), hardware="same", report=lines.append)
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert [call[1][0] & flag for builder in builds.builders for call in builder.calls if call[0] == "create_network"] == [flag] * len(
        GRAPHS
    )
    for config, (graph, own) in zip(builds.configs, build.profiles.items(), strict=True):
        asked = [call for call in config.calls if call[0] == "add_optimization_profile"]
        assert len(asked) == len(own), graph
        assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
        flags = {call[1][0] for call in config.calls if call[0] == "set_flag"}
        assert trt.BuilderFlag.TF32 not in flags
        assert not flags & {getattr(trt.BuilderFlag, name, None) for name in ("FP16", "INT8", "BF16")}
    for config, (graph, own) in zip(builds.configs, build.profiles.items(), strict=True):
        for call, profile in zip([call for call in config.calls if call[0] == "add_optimization_profile"], own, strict=True):
            shapes = {one[1][0]: tuple(map(tuple, one[1][1:])) for one in call[1][0].calls if one[0] == "set_shape"}
            values = {one[1][0]: tuple(map(tuple, one[1][1:])) for one in call[1][0].calls if one[0] == "set_shape_input"}
            assert values == ({"keep": profile["keep"]} if graph == "sampler" else {})
            assert {name: shape for name, shape in profile.items() if name != "keep"}.items() <= shapes.items()
    assert (engine_copy / build.plan("encoder")).read_bytes().startswith(b"plan")
    assert choose_build(read_manifest(engine_copy), HERE).id == build.id
    assert read_manifest(engine_copy).hash == manifest.hash
    # The same again is not built twice, something else is.
    made = len(builds.configs)
    assert build_engine(engine_copy, [8], max_batch=4, best_batch=(2,), hardware="same", report=lines.append).id == build.id
    assert len(builds.configs) == made and lines[-1] == f"already built: {build.folder}"
    assert build_engine(engine_copy, [8], max_batch=8, report=lines.append).id != build.id
    build_engine(engine_copy, [8], max_batch=8, force=True)
    assert len(builds.configs) == 3 * made
    assert [path for path in (engine_copy / "tensorrt").iterdir() if path.name.startswith(".")] == []


def test_int8_plans_are_built_from_signed_graphs(
    builds: Builds, engines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from enat.export.tensorrt_build import build_engine

    monkeypatch.chdir(tmp_path)
    engine = Path("engine")
    convert_engine(engines("tiny"), engine, Precision("int8"), Settings(images=10, float_layers=()))
    build = build_engine(engine, weights="stripped")
    assert build.options["steps"] == [read_manifest(engine).sampling.steps]
    for graph in ("condition", "encoder", "decoder", "image_decoder"):
        path = build.graphs[graph].weights
        assert path is not None and path.startswith(build.folder)
        assert objections(onnx.load(engine / path)) == []
    assert build.graphs["sampler"].weights == "sampler.onnx"
    assert choose_build(read_manifest(engine), HERE).id == build.id
    for config in builds.configs:
        assert builds.trt.BuilderFlag.STRIP_PLAN in {call[1][0] for call in config.calls if call[0] == "set_flag"}
    assert not (engine / build_engine(engine).folder / "graphs").exists()


def test_a_build_that_fails_leaves_the_engine_as_it_was(builds: Builds, engine_copy: Path) -> None:
    from enat.export.tensorrt_build import build_engine

    before = {path: path.read_bytes() for path in engine_copy.rglob("*") if path.is_file()}
    builds.failing = True
    with pytest.raises(ExportError, match=r"condition\.onnx: TensorRT .* cannot build it"):
        build_engine(engine_copy, [8])
    assert {path: path.read_bytes() for path in engine_copy.rglob("*") if path.is_file()} == before


def test_wrong_options(builds: Builds, engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from enat.export.tensorrt_build import build_engine

    for options, message in (
        ({"weights": "none"}, "unknown weights 'none'; expected included, refittable, stripped"),
        ({"hardware": "any"}, "unknown hardware 'any'"),
        ({"level": 6}, "optimization level of 0 to 5, got 6"),
        ({"max_batch": 0}, "best batches of 1 to the largest, 0, the smallest first, got 1"),
        ({"best_batch": (1, 32)}, "best batches of 1 to the largest, 16, the smallest first, got 1,32"),
        ({"best_batch": (8, 1)}, "the smallest first, got 8,1"),
        ({"best_batch": ()}, "the smallest first, got "),
        ({"version_compatible": True, "weights": "stripped"}, "--version-compatible goes with --weights included, not stripped"),
        ({"steps": [100]}, "expected 1 to 64 steps, got 100"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            build_engine(engine_copy, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has no build with these options to refit"):
        build_engine(engine_copy, [8], refit=engine_copy)
    with monkeypatch.context() as changed:
        changed.setattr(builds.trt, "__version__", "11.3.0.1")
        with pytest.raises(InputError, match=r"TensorRT 11\.3\.0\.1: refittable plans may compute wrongly"):
            build_engine(engine_copy, [8], weights="refittable")
    assert builds.configs == []


class Plans:
    """Stand-ins for what runs plans, on host memory; nothing is computed."""

    def __init__(self, trt: Any, engine: Path) -> None:
        self.trt = trt
        self.engine = engine
        self.contexts: list[StandIn] = []
        self.making: Callable[[], bool] = lambda: True

    def runtime(self, logger: Any) -> StandIn:
        return StandIn(Plans.real_runtime, deserialize_cuda_engine=self.deserialize)

    real_runtime: Any = None

    def deserialize(self, plan: bytes) -> StandIn:
        graph = plan.split()[-1].decode()
        outputs = {
            one.name: tuple(dim.dim_value or -1 for dim in one.type.tensor_type.shape.dim)
            for one in onnx.load(self.engine / f"{graph}.onnx").graph.output
        }
        return StandIn(
            self.trt.ICudaEngine,
            name=graph,
            create_execution_context=lambda strategy: self.context(graph),
            get_tensor_shape=outputs.get,
            get_tensor_location=lambda name: self.trt.TensorLocation.HOST if name == "keep" else self.trt.TensorLocation.DEVICE,
        )

    def context(self, graph: str) -> StandIn:
        assert self.making()
        found = StandIn(
            self.trt.IExecutionContext,
            name=graph,
            set_optimization_profile_async=True,
            set_input_shape=True,
            set_tensor_address=True,
            infer_shapes=lambda: [],
            update_device_memory_size_for_shapes=lambda: 1000 * (1 + len(self.contexts)),
            execute_async_v3=True,
        )
        self.contexts.append(found)
        return found


class StreamDevice(HostDevice):
    stream = 77

    def __init__(self, index: int) -> None:
        super().__init__()


@dataclasses.dataclass
class Running:
    """An engine on TensorRT's stand-ins."""

    pipeline: Pipeline
    plans: Plans
    lanes: list[Any]  # that were made

    @property
    def lane(self) -> Any:
        (lane,) = self.lanes
        return lane


@pytest.fixture
def running(trt: Any, engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    from enat.runtime.backends import tensorrt as backend_module

    manifest = listed(engine_copy, make_build(read_manifest(engine_copy)))
    plans = Plans(trt, engine_copy)
    Plans.real_runtime = trt.Runtime
    monkeypatch.setattr(trt, "Runtime", plans.runtime)
    monkeypatch.setattr(backend_module, "use_device", lambda device: 0)
    monkeypatch.setattr(backend_module, "platform_of", lambda index: HERE)
    monkeypatch.setattr(backend_module, "CudaDevice", StreamDevice)
    backend = backend_module.TensorRTBackend(manifest, "cuda:0")
    made = lanes_made(backend)
    with Pipeline(manifest, backend) as pipeline:
        yield Running(pipeline, plans, made)


def test_running_asks_tensorrt_for_what_was_meant(running: Running, engine_copy: Path) -> None:
    """Contexts of the right profiles, their shapes, addresses of memory that is there; and no more of them when runs are repeated."""
    pipeline, plans, manifest = running.pipeline, running.plans, running.pipeline.manifest
    steps = pipeline.schedule(8)
    pipeline.generate([1, 2, 3], seed=0, steps=8)
    made = [context.name for context in plans.contexts]
    assert made.count("decoder") == made.count("sampler") == 8 and made.count("encoder") == 7 and len(made) == 25
    profiles = {"decoder": iter(range(8)), "sampler": iter(range(8)), "encoder": iter(range(7))}
    for context in plans.contexts:
        asked = dict(context.calls)
        assert asked["set_optimization_profile_async"] == (next(profiles.get(context.name, iter([0]))), 77)
        assert asked["execute_async_v3"] == (77,)
        scratch, size = asked["set_device_memory"]
        running.lane.device.at(scratch, size)
        addresses = dict(arguments for name, arguments in context.calls if name == "set_tensor_address")
        graph = onnx.load(engine_copy / f"{context.name}.onnx").graph
        assert set(addresses) == {port.name for port in (*graph.input, *graph.output)}
        assert all(address % 256 == 0 for name, address in addresses.items() if name != "keep")
    samplers = [context for context in plans.contexts if context.name == "sampler"]
    for step, context in zip(steps, samplers, strict=True):
        shapes = dict(arguments for name, arguments in context.calls if name == "set_input_shape")
        assert shapes["logits"] == (6 if step.index else 3, step.masked, manifest.model.codes)
        assert "keep" not in shapes
    for seed in range(3):
        pipeline.generate([4, 5, 6], seed=seed, steps=8)
    assert len(plans.contexts) == 25
    runs = [sum(name == "execute_async_v3" for name, _ in context.calls) for context in plans.contexts]
    assert set(runs) == {2}  # once to run, once to be recorded
    pipeline.generate([1], seed=0, steps=5)  # by the general profiles
    general = {context.name: context for context in plans.contexts[25:]}
    assert ("set_optimization_profile_async", (7, 77)) in general["encoder"].calls
    with pytest.raises(InputError, match=r"5 images at once are too many for this TensorRT build; expected at most 4"):
        pipeline.generate([1] * 5, seed=0)


def drawn(running: Running, images: int, steps: int = 8, callback: Any = None) -> int:
    """How many contexts a run makes; none of them while it is recorded."""
    before = len(running.plans.contexts)
    running.plans.making = lambda: all(not lane.recording for lane in running.lanes)
    running.pipeline.generate([1] * images, seed=0, steps=steps, callback=callback)
    return len(running.plans.contexts) - before


def test_runs_that_are_not_recorded_share_contexts(running: Running) -> None:
    """One for each profile, set to the shapes of the moment."""
    watch = lambda step, steps, preview: None  # noqa: E731
    assert drawn(running, 1, callback=watch) == 25
    assert drawn(running, 4, callback=watch) == drawn(running, 1, callback=watch) == 0
    assert drawn(running, 1, steps=40, callback=watch) == 3  # the general profiles
    general = next(context for context in running.plans.contexts[25:] if context.name == "sampler")
    addresses = [arguments[1] for name, arguments in general.calls if name == "set_tensor_address" and arguments[0] == "keep"]
    keeps = [ctypes.c_int64.from_address(address).value for address in addresses]  # what was bound stays as it was
    assert len(keeps) > 30 and keeps == sorted(keeps, reverse=True)
    assert set(keeps) <= {step.keep for step in running.pipeline.schedule(40)}
    assert drawn(running, 1) == drawn(running, 2) == 25  # recorded runs have their own


def test_records_make_room_for_contexts(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enat.runtime.backends.tensorrt.CONTEXTS", 60)
    assert [drawn(running, images) for images in (1, 2, 1, 3, 3, 3, 2, 2, 1)] == [25, 25, 0, 25, 0, 0, 25, 0, 25]
    assert sum(len(record.executions) for record in running.lane.kept.values()) <= 60


def test_runs_too_long_to_be_recorded(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enat.runtime.backends.tensorrt.CONTEXTS", 10)
    assert drawn(running, 2) == 10 + 15
    with pytest.warns(
        RuntimeWarning, match="not recorded as one launch, its graphs are launched one by one: decoder: no execution context"
    ):
        assert drawn(running, 2) == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn(running, 2) == drawn(running, 2) == 0


class Refits:
    """Stand-ins for what gives plans other weights."""

    def __init__(self, trt: Any, monkeypatch: pytest.MonkeyPatch, succeeds: bool = True) -> None:
        self.files: list[str] = []
        self.refitted = 0
        refitter, parser = trt.Refitter, trt.OnnxParserRefitter
        monkeypatch.setattr(trt, "Refitter", lambda engine, logger: StandIn(refitter, refit_cuda_engine=self.refit))
        monkeypatch.setattr(trt, "OnnxParserRefitter", lambda refitter, logger: StandIn(parser, refit_from_file=self.parse))
        self.succeeds = succeeds

    def parse(self, path: str) -> bool:
        self.files.append(path)
        return self.succeeds

    def refit(self) -> bool:
        self.refitted += 1
        return True


def test_a_plan_without_weights_takes_those_of_its_graph(trt: Any, engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from enat.runtime.backends import tensorrt as backend_module

    build = make_build(read_manifest(engine_copy), weights="stripped")
    graphs = {name: dataclasses.replace(graph, weights=f"{name}.onnx") for name, graph in build.graphs.items()}
    manifest = listed(engine_copy, dataclasses.replace(build, graphs=graphs))
    plans, refits = Plans(trt, engine_copy), Refits(trt, monkeypatch)
    Plans.real_runtime = trt.Runtime
    monkeypatch.setattr(trt, "Runtime", plans.runtime)
    monkeypatch.setattr(backend_module, "use_device", lambda device: 0)
    monkeypatch.setattr(backend_module, "platform_of", lambda index: HERE)
    backend = backend_module.TensorRTBackend(manifest, "cuda:0")
    for _ in range(2):
        backend.plans.engine("encoder")
    assert refits.files == [str(engine_copy / "encoder.onnx")] and refits.refitted == 1
    refits.succeeds = False
    with pytest.raises(BackendError, match=r"decoder\.onnx: TensorRT could not take the weights from it"):
        backend.plans.engine("decoder")


def test_new_weights_without_a_new_build(builds: Builds, engine_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refittable build of one checkpoint becomes that of the next one."""
    from enat.export.tensorrt_build import build_engine

    trt = builds.trt
    new = Path(shutil.copytree(engine_copy, tmp_path / "new"))
    first = build_engine(engine_copy, [8], weights="refittable")
    assert all(trt.BuilderFlag.REFIT in {call[1][0] for call in config.calls if call[0] == "set_flag"} for config in builds.configs)
    made = len(builds.configs)
    refits, runtime = Refits(trt, monkeypatch), trt.Runtime
    config = StandIn(trt.ISerializationConfig)
    engine = StandIn(trt.ICudaEngine, create_serialization_config=lambda: config, serialize_with_config=lambda config: b"refitted")
    monkeypatch.setattr(trt, "Runtime", lambda logger: StandIn(runtime, deserialize_cuda_engine=lambda plan: engine))
    build = build_engine(new, [8], refit=engine_copy)
    assert refits.files == [str(new / f"{graph}.onnx") for graph in first.graphs]
    assert (new / build.plan("encoder")).read_bytes() == b"refitted"
    refittable = getattr(trt.SerializationFlag, "INCLUDE_REFIT", None)
    assert {call[1][0] for call in config.calls if call[0] == "set_flag"} == ({refittable} if refittable else set())
    assert len(builds.configs) == made
    with pytest.raises(InputError, match="has no build with these options to refit"):
        build_engine(new, [4], refit=engine_copy)


def test_signatures_are_read_off_docstrings(trt: Any) -> None:
    """The helper: it refuses what the bindings do not document."""
    assert {len(one.parameters) for one in signatures(trt.IExecutionContext.set_input_shape)} == {3}
    assert len(signatures(trt.ICudaEngine.create_execution_context)) >= 2
    context = StandIn(trt.IExecutionContext)
    with pytest.raises(AttributeError, match="has no enqueue_v2"):
        context.enqueue_v2(0)
    with pytest.raises(AssertionError, match="execute_async_v3"):
        context.execute_async_v3()


# Without a GPU


def no_gpu() -> bool:
    try:
        from enat.runtime.backends.cuda import device_index

        device_index("cuda")
    except BackendError:
        return True
    return False


@pytest.mark.skipif(not no_gpu(), reason="there is a GPU")
def test_without_a_gpu(trt: Any, engine_copy: Path) -> None:
    from enat.export.cli import main as export
    from enat.runtime.cli import main as run

    for command, arguments in (
        (export, ["--engine", engine_copy, "--tensorrt"]),
        (run, ["--engine", engine_copy, "--class", "1", "--out", "x.png", "--backend", "tensorrt", "--device", "cuda:0"]),
    ):
        result = invoke(command, *arguments)
        assert result.exit_code == 1
        assert re.search(r"cuda:0: no GPU that CUDA can use: CUDA: .*; nvidia-smi shows drivers and devices", result.output), result.output
        assert result.output.count("\n") == 1
