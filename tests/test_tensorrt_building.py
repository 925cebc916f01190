"""Building TensorRT plans without a GPU: what is asked of the API, against what its bindings document."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import invoke, list_anew
from tensorrt_operators import objections
from tensorrt_stand_in import Refits, StandIn, signatures
from test_tensorrt_builds import GRAPHS, HERE

from enat.calibration.calibrate import Settings
from enat.errors import BackendError, EngineError, ExportError, InputError
from enat.export.convert import Precision, convert_engine
from enat.runtime.builds import choose_build
from enat.runtime.manifest import FILE, read_manifest


def test_signatures_are_read_off_docstrings(trt: Any) -> None:
    """The helper: it refuses what the bindings do not document."""
    assert {len(one.parameters) for one in signatures(trt.IExecutionContext.set_input_shape)} == {3}
    assert len(signatures(trt.ICudaEngine.create_execution_context)) >= 2
    context = StandIn(trt.IExecutionContext)
    with pytest.raises(AttributeError, match="has no enqueue_v2"):
        context.enqueue_v2(0)
    with pytest.raises(AssertionError, match="execute_async_v3"):
        context.execute_async_v3()


def onnx_network(trt: Any, model: bytes) -> StandIn:
    """The network that TensorRT's parser would make, as far as its inputs go."""
    inputs = []
    for port in onnx.ModelProto.FromString(model).graph.input:
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
        self.failing = ""  # what TensorRT reports then
        monkeypatch.setattr(trt, "Builder", self.builder)
        monkeypatch.setattr(trt, "Runtime", lambda logger: StandIn(type(self).real_runtime))
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
            build_serialized_network=lambda network, config: self.build(logger),
            logger=logger,
        )
        self.builders.append(found)
        return found

    real_builder: Any = None
    real_runtime: Any = None

    def build(self, logger: Any) -> bytes | None:
        if not self.failing:
            return f"plan {len(self.configs)}".encode()
        logger.log(self.trt.ILogger.Severity.ERROR, self.failing + "\nand more of it")
        logger.log(self.trt.ILogger.Severity.ERROR, "what followed from it")
        return None

    def network(self, flags: int = 0) -> StandIn:
        self.networks.append(StandIn(self.trt.INetworkDefinition, num_inputs=0, num_outputs=0))
        return self.networks[-1]

    def config(self) -> StandIn:
        defaults: dict[str, Any] = {"DLA_core": -1, "get_memory_pool_limit": 0, "get_tactic_sources": 0, "num_optimization_profiles": 0}
        timings = StandIn(self.trt.ITimingCache, serialize=lambda: contextlib.nullcontext(b"timings"), combine=True)
        self.configs.append(
            StandIn(self.trt.IBuilderConfig, create_timing_cache=lambda data: timings, get_timing_cache=lambda: timings, **defaults)
        )
        return self.configs[-1]

    def profile(self) -> StandIn:
        self.profiles.append(StandIn(self.trt.IOptimizationProfile))
        return self.profiles[-1]

    def parser(self, network: StandIn, logger: Any) -> StandIn:
        def parse(model: bytes, path: str) -> bool:
            network.__dict__.update(onnx_network(self.trt, model).__dict__)
            return True

        return StandIn(Builds.real_parser, parse=parse, num_errors=0)

    real_parser: Any = None


@pytest.fixture
def builds(trt: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Builds]:
    if not hasattr(trt, "OnnxParser"):
        pytest.skip("these bindings have no ONNX parser")
    Builds.real_builder, Builds.real_parser, Builds.real_runtime = trt.Builder, trt.OnnxParser, trt.Runtime
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
        preview = {call[1] for call in config.calls if call[0] == "set_preview_feature"}
        assert (trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True) in preview
        sharing = getattr(trt.PreviewFeature, "PROFILE_SHARING_0806", None)  # contexts share profiles
        assert sharing is None or (sharing, True) in preview
        assert config.profiling_verbosity == trt.ProfilingVerbosity.LAYER_NAMES_ONLY
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


def test_builds_that_are_there_are_taken_again(builds: Builds, engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was asked for last runs; plans that were damaged, or are of graphs in another form, are built again."""
    from enat.export import tensorrt_build

    lines: list[str] = []

    def build(**options: Any) -> str:
        made = tensorrt_build.build_engine(engine_copy, [8], report=lines.append, **options)
        chosen = choose_build(read_manifest(engine_copy), HERE)
        assert chosen == made
        return made.id

    first, second = build(), build(tf32=True)
    made = len(builds.configs)
    assert build() == first != second and build(tf32=True) == second and build() == first
    assert len(builds.configs) == made
    plan = engine_copy / "tensorrt" / first / "decoder.plan"
    monkeypatch.setattr("enat.runtime.manifest.HASHED_AT_LOAD", 0)  # sizes alone tell nothing
    for kept, found in ((1, "1 bytes, expected"), (None, "sha256 ")):
        damaged = bytes(len(plan.read_bytes()))[:kept]
        plan.write_bytes(damaged)
        made = len(builds.configs)
        assert build() == first and len(builds.configs) > made and plan.read_bytes() != damaged
        assert any(line.startswith("built again: ") and f"decoder.plan: {found}" in line for line in lines)
    monkeypatch.setattr(tensorrt_build, "source_hash", lambda *modules: "another")
    assert build() not in (first, second)


def test_the_command_and_its_options(builds: Builds, engine_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from enat.export import tensorrt_build
    from enat.export.cli import main

    trt, cache = builds.trt, tmp_path / "timing.cache"
    monkeypatch.setattr(tensorrt_build, "device_index", lambda device: 0)
    asked = ["--steps", "4,8", "--max-batch", 6, "--best-batch", "2,6", "--hardware", "ampere+", "--version-compatible", "--tf32"]
    result = invoke(main, "--engine", engine_copy, "--tensorrt", *asked, "--build-level", 5, "--timing-cache", cache)
    assert result.exit_code == 0, result.output
    build = choose_build(read_manifest(engine_copy), HERE)
    assert f"TensorRT build for {HERE}: {engine_copy / build.folder}" in result.output
    assert build.options["steps"] == [4, 8] and build.options["best_batch"] == [2, 6] and build.options["max_batch"] == 6
    for config in builds.configs:
        flags = {call[1][0] for call in config.calls if call[0] == "set_flag"}
        assert {trt.BuilderFlag.TF32, trt.BuilderFlag.VERSION_COMPATIBLE} <= flags
        assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
        assert config.builder_optimization_level == 5
        assert isinstance(config.progress_monitor, trt.IProgressMonitor)
    assert cache.read_bytes() == b"timings"
    kept = [call for config in builds.configs for call in config.calls if call[0] == "create_timing_cache"]
    assert kept[-1][1] == (b"timings",)  # the graphs built later read it


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


def files(engine: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in engine.rglob("*") if path.is_file()}


def test_a_build_that_fails_leaves_the_engine_as_it_was(
    builds: Builds, engine_copy: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is TensorRT's first one, and nothing else is printed; a full disk is told too."""
    from enat.export import tensorrt_build
    from enat.export.tensorrt_build import build_engine

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    before = files(engine_copy)
    builds.failing = "no implementation for node Mul_3"
    for _ in range(2):
        with pytest.raises(ExportError, match=r"condition\.onnx: TensorRT .* cannot build it: no implementation for node Mul_3$"):
            build_engine(engine_copy, [8])
    assert files(engine_copy) == before
    builds.failing = ""
    with monkeypatch.context() as changed:
        changed.setattr(tensorrt_build, "put_in_manifest", full)
        with pytest.raises(ExportError, match="engine: not built: the disk is full"):
            build_engine(engine_copy, [8])
    assert files(engine_copy) == before
    monkeypatch.setattr(builds.trt, "Runtime", Builds.real_runtime)
    if Builds.real_runtime.__module__ == "tensorrt_bindings.tensorrt":  # on empty libraries
        with pytest.raises(BackendError, match=r"TensorRT .* cannot start"):
            build_engine(engine_copy, [8])
    assert capfd.readouterr() == ("", "")


def test_a_build_in_place_of_the_same_one(builds: Builds, engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, or the one that was there."""
    from enat.export import tensorrt_build

    build = tensorrt_build.build_engine(engine_copy, [8])
    before = files(engine_copy)
    with monkeypatch.context() as changed:
        changed.setattr(tensorrt_build, "write_builds", lambda manifest, builds: pytest.fail("the disk is full"))
        with pytest.raises(pytest.fail.Exception):
            tensorrt_build.build_engine(engine_copy, [8], force=True)
        assert files(engine_copy) == before
        with pytest.raises(pytest.fail.Exception):
            tensorrt_build.build_engine(engine_copy, [4])
        assert files(engine_copy) == before
    write = tensorrt_build.write_builds

    def interrupted(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr(tensorrt_build, "write_builds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tensorrt_build.build_engine(engine_copy, [8], force=True)
    assert choose_build(read_manifest(engine_copy, verify=True), HERE).id == build.id
    before = files(engine_copy)
    assert tensorrt_build.build_engine(engine_copy, [8], force=True).id == build.id
    after = files(engine_copy)
    assert after.keys() == before.keys() and after != before
    assert choose_build(read_manifest(engine_copy, verify=True), HERE).id == build.id


def test_ctrl_c_ends_a_build(builds: Builds, engine_copy: Path, monkeypatch: pytest.MonkeyPatch, ctrl_c: Callable[[], None]) -> None:
    """Whenever it comes: TensorRT would drop it in its callbacks, into which signals come first of all."""
    from enat.export.tensorrt_build import build_engine
    from enat.runtime.backends.tensorrt import LOGGER

    before = files(engine_copy)

    def build(self: Builds, logger: Any) -> bytes:
        monitor = self.configs[-1].progress_monitor
        monitor.phase_start("outer", None, 3)
        assert monitor.step_complete("outer", 0)
        ctrl_c()
        logger.log(self.trt.ILogger.Severity.VERBOSE, "one of many")
        assert not monitor.step_complete("outer", 1)
        monitor.phase_finish("outer")
        return b"plan"  # as after the last step

    monkeypatch.setattr(Builds, "build", build)
    for progress in (True, False):
        with pytest.raises(KeyboardInterrupt):
            build_engine(engine_copy, [8], progress=progress)
        assert files(engine_copy) == before and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(builds.configs) == 2
    assert {builder.logger for builder in builds.builders} == {LOGGER}


def test_what_the_parser_refuses(builds: Builds, engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from enat.export.tensorrt_build import build_engine

    refused = StandIn(builds.trt.ParserError, desc=lambda: "no importer for Mul\nand more")
    parser = StandIn(Builds.real_parser, parse=lambda model, path: False, num_errors=1, get_error=lambda index: refused)
    monkeypatch.setattr(builds.trt, "OnnxParser", lambda network, logger: parser)
    with pytest.raises(ExportError, match=r"condition\.onnx: TensorRT .* cannot build it: no importer for Mul$"):
        build_engine(engine_copy, [8])


def test_wrong_options(builds: Builds, engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from enat.export.tensorrt_build import build_engine, check_options

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
    monkeypatch.setattr("enat.export.tensorrt_build.device_index", lambda device: 0)
    with pytest.raises(InputError, match="engine: expected a file"):
        check_options(timing_cache=engine_copy)
    with pytest.raises(InputError, match=r"manifest\.json: expected an engine directory"):
        check_options(refit=engine_copy / FILE)
    check_options(timing_cache=engine_copy / "new", refit=engine_copy)
    assert builds.configs == []


def test_new_weights_without_a_new_build(builds: Builds, engine_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refittable build of one checkpoint becomes that of the next one."""
    from enat.export.tensorrt_build import build_engine

    trt = builds.trt
    new = Path(shutil.copytree(engine_copy, tmp_path / "new"))
    first = build_engine(engine_copy, [8], weights="refittable")
    assert all(trt.BuilderFlag.REFIT in {call[1][0] for call in config.calls if call[0] == "set_flag"} for config in builds.configs)
    made = len(builds.configs)
    refits = Refits(trt, monkeypatch)
    config = StandIn(trt.ISerializationConfig)
    engine = StandIn(trt.ICudaEngine, create_serialization_config=lambda: config, serialize_with_config=lambda config: b"refitted")
    monkeypatch.setattr(trt, "Runtime", lambda logger: StandIn(Builds.real_runtime, deserialize_cuda_engine=lambda plan: engine))
    changed = onnx.load(new / "encoder.onnx")
    weights = changed.graph.initializer[0]
    weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights) + 1, weights.name))
    onnx.save(changed, new / "encoder.onnx")
    list_anew(new)
    before = files(new)
    with pytest.raises(
        BackendError, match=rf"encoder\.onnx: its {re.escape(weights.name)} differs, and the plan takes no other in place of"
    ):
        build_engine(new, [8], refit=engine_copy)
    assert files(new) == before
    refits.files.clear()
    refits.weights = [weights.name]
    build = build_engine(new, [8], refit=engine_copy)
    assert refits.files == [str(new / f"{graph}.onnx") for graph in first.graphs]
    assert (new / build.plan("encoder")).read_bytes() == b"refitted"
    refittable = getattr(trt.SerializationFlag, "INCLUDE_REFIT", None)
    assert {call[1][0] for call in config.calls if call[0] == "set_flag"} == ({refittable} if refittable else set())
    assert len(builds.configs) == made
    build_engine(engine_copy, [2])  # not refittable
    elsewhere = dataclasses.replace(HERE, device="NVIDIA L4", capability="8.9")
    for steps, options, here in (([4], {}, HERE), ([2], {}, HERE), ([8], {"tf32": True}, HERE), ([8], {}, elsewhere)):
        monkeypatch.setattr("enat.export.tensorrt_build.platform_of", lambda index, here=here: here)
        with pytest.raises(InputError, match="has no build with these options to refit"):
            build_engine(new, steps, refit=engine_copy, **options)


def test_a_damaged_plan_is_not_refitted(builds: Builds, engine_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hash would become that of a plan which nobody built."""
    from enat.export import tensorrt_build

    monkeypatch.setattr("enat.runtime.manifest.HASHED_AT_LOAD", 0)
    monkeypatch.setattr(tensorrt_build, "refitted", lambda plan, old, new: b"refitted")
    new = Path(shutil.copytree(engine_copy, tmp_path / "new"))
    plan = engine_copy / tensorrt_build.build_engine(engine_copy, [8], weights="refittable").plan("condition")
    plan.write_bytes(bytes(len(plan.read_bytes())))
    with pytest.raises(EngineError, match=r"condition\.plan: .*the file was altered"):
        tensorrt_build.build_engine(new, [8], refit=engine_copy)


def test_graphs_of_another_form_are_not_refitted(trt: Any, tmp_path: Path) -> None:
    """The plan would keep what the new graph has no more."""
    from enat.export.tensorrt_graphs import Prepared
    from enat.export.tensorrt_plan import form, refitted

    def graph(name: str, nodes: str, **constants: float) -> Prepared:
        text = f'<ir_version: 10, opset_import: ["": 20]> g (float[2] x) => (float[2] y) {{ {nodes} }}'
        model = onnx.parser.parse_model(text)
        tensors = [onnx.numpy_helper.from_array(np.full(2, value, np.float32), key) for key, value in constants.items()]
        model.graph.initializer.extend(tensors)
        onnx.save(model, tmp_path / name)
        return Prepared(tmp_path / name, tmp_path / name)

    old = graph("old", "h = Mul(x, a) y = Elu<alpha = 0.5>(h)", a=1, b=2)
    assert form(old) == form(graph("values", "h = Mul(x, a) y = Elu<alpha = 0.5>(h)", a=3, b=4))
    for nodes, constants in (
        ("h = Mul(x, a) y = Elu<alpha = 0.5>(h)", {"a": 1}),
        ("h = Mul(x, a) y = Elu<alpha = 0.6>(h)", {"a": 1, "b": 2}),
        ("h = Add(x, a) y = Elu<alpha = 0.5>(h)", {"a": 1, "b": 2}),
        ("h = Mul(x, b) y = Elu<alpha = 0.5>(h)", {"a": 1, "b": 2}),
    ):
        with pytest.raises(BackendError, match=r"new: has other layers than the graph that the plan was built of; build it anew"):
            refitted(tmp_path / "plan", old, graph("new", nodes, **constants))


def test_weights_that_a_refit_must_change(trt: Any, tmp_path: Path) -> None:
    """Those of other values, or of another type, and those that were not there."""
    from enat.export.tensorrt_graphs import Prepared
    from enat.export.tensorrt_plan import changed_weights

    zeros, ones = np.zeros(2, np.float32), np.ones(1, np.float32)
    graphs = []
    for name, constants in (
        ("old", {"same": ones, "value": ones, "type": zeros, "gone": ones}),
        ("new", {"same": ones, "value": 2 * ones, "type": zeros.astype(np.float16), "new": ones}),
    ):
        tensors = [onnx.numpy_helper.from_array(values, key) for key, values in constants.items()]
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors)), tmp_path / name)
        graphs.append(Prepared(tmp_path / name, tmp_path / name))
    assert changed_weights(*graphs) == ["value", "type", "new"]
