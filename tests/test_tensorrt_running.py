"""Running TensorRT plans without a GPU: what is asked of the API, against what its bindings document."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import os
import re
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import invoke, list_anew
from host_device import HostDevice, lanes_made
from tensorrt_stand_in import Refits, StandIn
from test_tensorrt_builds import HERE, listed, make_build

from enat import Pipeline
from enat.errors import BackendError, EngineError, InputError
from enat.runtime.manifest import read_manifest
from enat.runtime.pipeline import Preview


class Plans:
    """Stand-ins for what runs plans, on host memory; nothing is computed."""

    def __init__(self, trt: Any, engine: Path) -> None:
        self.trt = trt
        self.engine = engine
        self.contexts: list[StandIn] = []
        self.making: Callable[[], bool] = lambda: True
        self.largest_scratch = self.profile_scratch = 0
        self.busy: set[int] = set()  # contexts that were launched, until somebody waits
        self.launched: Counter[int] = Counter()  # how often
        self.launching: Callable[[], object] = lambda: None
        self.dropped: dict[int, bool] = {}  # contexts that are gone: whether they were busy
        self.scratch = lambda: 1000 * (1 + len(self.contexts))
        self.limit = 2**40  # of the device's memory
        self.failing: tuple[int, str] | None = None  # the context and the call that fails
        self.failures: list[int] = []  # contexts of which one call failed
        self.report = ""  # what TensorRT reports then
        self.keep = "HOST"  # where plans want it
        self.results: dict[str, Any] = {}  # of contexts' functions, in place of what they give otherwise

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
            create_execution_context=lambda strategy: (
                None if self.fails(len(self.contexts), "create_execution_context") else self.context(graph)
            ),
            get_tensor_shape=outputs.get,
            device_memory_size_v2=self.largest_scratch,
            get_device_memory_size_for_profile_v2=lambda profile: self.profile_scratch,
            get_tensor_location=lambda name: getattr(self.trt.TensorLocation, self.keep if name == "keep" else "DEVICE"),
        )

    def fails(self, number: int, name: str) -> bool:
        if self.failing != (number, name):
            return False
        from enat.runtime.backends.tensorrt import LOGGER

        self.failures.append(number)
        if self.report:
            LOGGER.log(self.trt.ILogger.Severity.ERROR, self.report)
        return True

    def context(self, graph: str) -> StandIn:
        assert self.making()
        number = len(self.contexts)

        def execute(stream: int) -> bool:
            if self.fails(number, "execute_async_v3"):
                return False
            self.busy.add(number)
            self.launched[number] += 1
            self.launching()
            return True

        def scratch(address: int, size: int) -> None:
            assert number not in self.busy, "set anew while it runs"
            self.fails(number, "set_device_memory")

        results: dict[str, Any] = {
            "set_optimization_profile_async": True,
            "set_input_shape": True,
            "set_tensor_address": True,
            "infer_shapes": lambda: [],
            "update_device_memory_size_for_shapes": lambda: self.scratch(),
            "set_device_memory": scratch,
            "execute_async_v3": execute,
        }
        found = StandIn(self.trt.IExecutionContext, name=graph, **{**results, **self.results})
        weakref.finalize(found, lambda: self.dropped.update({number: number in self.busy}))
        self.contexts.append(found.twin())
        return found


class StreamDevice(HostDevice):
    stream = 77

    def __init__(self, plans: Plans) -> None:
        super().__init__(plans.limit)
        self.plans = plans

    def synchronize(self) -> None:
        self.plans.busy.clear()
        super().synchronize()


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
    monkeypatch.setattr(backend_module, "CudaDevice", lambda index: StreamDevice(plans))
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
    assert set(runs) == {3}  # twice to run, as their scratch memory grew meanwhile, once to be recorded
    pipeline.generate([1], seed=0, steps=5)  # by the general profiles
    general = {context.name: context for context in plans.contexts[25:]}
    assert ("set_optimization_profile_async", (7, 77)) in general["encoder"].calls
    with pytest.raises(InputError, match=r"5 images at once are too many for this TensorRT build \(--max-batch\); expected at most 4"):
        pipeline.generate([1] * 5, seed=0)


def drawn(running: Running, images: int, steps: int = 8, callback: Any = None) -> int:
    """How many contexts a run makes; none of them while it is recorded."""
    before = len(running.plans.contexts)
    running.plans.making = lambda: all(not lane.recording for lane in running.lanes)
    running.pipeline.generate([1] * images, seed=0, steps=steps, callback=callback)
    return len(running.plans.contexts) - before


def test_runs_that_are_not_recorded_share_contexts(running: Running) -> None:
    """One for each profile, set to the shapes of the moment when what it runs is done."""
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


def test_a_record_launches_each_context_once(running: Running) -> None:
    """Of many steps some have the same shapes."""
    steps = running.pipeline.schedule(64)
    assert len({(step.new, step.masked) for step in steps}) < len(steps)
    assert drawn(running, 1, steps=64) == 64 + 64 + 63 + 2
    launched = running.plans.launched.copy()
    assert drawn(running, 1, steps=64) == 0
    (record,) = running.lane.kept.values()
    assert record.launch is not None
    assert set((running.plans.launched - launched).values()) == {1}


def test_runs_with_new_shapes_are_not_beside_records(running: Running) -> None:
    """They hold what keeps records from being made meanwhile, as TensorRT may load kernels then; others do not."""
    held: list[bool] = []
    lock = threading.RLock()
    running.plans.scratch = lambda: 1000  # whoever needs more has all set their shapes anew
    running.plans.launching = lambda: held.append(lock._is_owned())  # type: ignore[attr-defined]
    watch = lambda step, steps, preview: None  # noqa: E731
    running.pipeline.backend.plans.setting_up = lock  # type: ignore[attr-defined]
    with running.pipeline.backend.lease() as lane:
        lane.device.setting_up = lock  # type: ignore[attr-defined]
    for images, new in ((1, True), (1, False), (2, True), (2, False)):
        held.clear()
        drawn(running, images, callback=watch)
        assert held == [new] * 25


def test_contexts_share_their_scratch_memory(running: Running) -> None:
    """The largest piece that one of them needs is all that is needed, though each needs more than the one before."""
    sizes = itertools.count(2**20, 2**20)
    running.plans.scratch = sizes.__next__
    running.plans.limit = 25 * 2**20 + 2**22  # for 25 contexts and the tensors
    for seed in range(3):
        running.pipeline.generate([1], seed=seed)
    (record,) = running.lane.kept.values()
    for context in running.plans.contexts:
        asked = [name for name, _ in context.calls]
        given = len(asked) - asked[::-1].index("set_device_memory")
        assert asked[given:].count("execute_async_v3") >= 2  # it ran with that before it was recorded
    assert {id(context.scratch) for context in record.executions.values()} == {id(running.lane.scratch)}
    assert running.lane.scratch.size >= 25 * 2**20
    before = running.lane.scratch
    running.plans.limit = running.lane.device.limit = 2**40
    running.pipeline.generate([1, 2], seed=0)  # makes it larger; the record goes on using what it was made with
    assert running.lane.scratch is not before
    assert {id(context.scratch) for context in record.executions.values()} == {id(before)}


def test_contexts_outlive_what_they_launched(running: Running) -> None:
    """Where memory is short while one is set up, all are forgotten; but not what runs."""
    watch = lambda step, steps, preview: None  # noqa: E731
    drawn(running, 1, callback=watch)
    drawn(running, 4)
    device = running.lane.device
    device.limit -= device.free_memory() - 2**17
    running.plans.scratch = lambda: 2**20 + 1000 * len(running.plans.contexts)  # more than is free, until records are forgotten
    assert running.lane.kept
    drawn(running, 1, steps=40, callback=watch)
    assert not running.lane.kept  # memory was short
    loaded = running.pipeline.backend.plans.engines  # type: ignore[attr-defined]
    assert loaded
    running.pipeline.close()
    assert not loaded and running.plans.dropped and not any(running.plans.dropped.values())


def test_memory_that_is_short_before_any_plan_is_loaded(running: Running) -> None:
    running.plans.limit = 2**11
    with pytest.raises(BackendError, match=r"1 at once need more than \d+ MiB, 0 MiB are free; not even one fits"):
        running.pipeline.decode(np.zeros((1, 8, 8), np.int64))


@pytest.mark.parametrize("failing", ["create_execution_context", "execute_async_v3"])
def test_contexts_outlive_what_failed_after_it(running: Running, failing: str) -> None:
    """What was launched before still runs."""
    plans = running.plans
    plans.scratch = lambda: 1000  # nobody waits for the sake of a larger one
    plans.failing = (5, failing)
    with pytest.raises(BackendError):
        running.pipeline.generate([1], seed=0)
    assert len(plans.contexts) >= 5
    plans.failing = None
    running.pipeline.close()
    assert len(plans.dropped) == len(plans.contexts) and not any(plans.dropped.values())


def test_contexts_outlive_what_they_launched_where_tensors_find_no_memory(running: Running) -> None:
    def use_up(step: int, steps: int, preview: Preview) -> None:
        device = running.lane.device
        if step == 3:
            running.lane.arena.free_unused()
            device.limit -= device.free_memory()
            assert running.plans.busy

    with pytest.raises(BackendError, match="1 at once need more than"):
        running.pipeline.generate([1], seed=0, callback=use_up)
    assert running.plans.dropped and not any(running.plans.dropped.values())


def test_no_memory_is_given_back_while_a_record_is_made(running: Running) -> None:
    drawn(running, 1)
    running.lane.arena.free_unused()
    running.lane.device.limit -= running.lane.device.free_memory()
    with pytest.warns(RuntimeWarning, match="not recorded"), pytest.raises(BackendError, match="1 at once need more than"):
        drawn(running, 1)


def test_all_contexts_move_to_larger_scratch_memory(running: Running) -> None:
    """What was the smaller one may be tensors by then."""
    watch = lambda step, steps, preview: None  # noqa: E731
    running.plans.scratch = itertools.count(2**12, 2**12).__next__
    drawn(running, 1, callback=watch)
    running.plans.scratch = lambda: 2**10
    drawn(running, 1, callback=watch)
    mine = running.lane.scratch.address, running.lane.scratch.size
    for context in running.plans.contexts:
        *_, last = (arguments for name, arguments in context.calls if name == "set_device_memory")
        assert last == mine


def test_memory_that_is_short_for_a_context(running: Running) -> None:
    """Records of other runs are dropped for it."""
    drawn(running, 1)
    assert running.lane.kept

    def reclaim() -> bool:
        running.plans.failing = None
        return running.lane.forget()

    running.plans.failing, running.lane.arena.reclaim = (30, "create_execution_context"), reclaim
    assert drawn(running, 2) == 25
    assert running.plans.failures == [30] and len(running.lane.kept) == 1


def test_a_reason_is_that_of_the_failure_itself(running: Running) -> None:
    """Not of an earlier one that was mended."""
    drawn(running, 1)

    def reclaim() -> bool:
        running.plans.failing, running.plans.results["set_input_shape"] = None, False
        return running.lane.forget()

    running.plans.report = "Error Code 2: out of memory"
    running.plans.failing, running.lane.arena.reclaim = (30, "create_execution_context"), reclaim
    with pytest.raises(BackendError, match=r"TensorRT does not take \w+ \[.*\]: $"):
        running.pipeline.generate([1, 2], seed=0)


def test_tensorrt_tells_of_memory_in_its_log(running: Running) -> None:
    """A launch that fails for want of it names the batch that fits; one that fails otherwise gives the reason."""
    running.plans.scratch = lambda: 1000
    running.plans.failing, running.plans.report = (5, "execute_async_v3"), "Error Code 1: Cuda Runtime (out of memory)"
    with pytest.raises(
        BackendError, match=r"TensorRT failed: Error Code 1: .* 4 at once need more than \d+ MiB, \d+ MiB are free; a batch of 2 fits"
    ):
        running.pipeline.generate([1] * 4, seed=0)
    running.plans.failing, running.plans.report = (len(running.plans.contexts) + 5, "execute_async_v3"), "Error Code 2: a kernel\nand more"
    with pytest.raises(BackendError, match=r"TensorRT failed: Error Code 2: a kernel$"):
        running.pipeline.generate([1] * 4, seed=0)


def test_scratch_memory_that_tensorrt_cannot_tell_or_does_not_take(running: Running) -> None:
    """It says so in no other way than by 0 bytes, and by its log."""
    running.plans.scratch, running.plans.profile_scratch = (lambda: 0), 5000
    running.pipeline.generate([1], seed=0)
    sizes = {
        size
        for context in running.plans.contexts
        for name, arguments in context.calls
        if name == "set_device_memory"
        for size in arguments[1:]
    }
    assert min(sizes) >= 5000
    running.plans.failing, running.plans.report = (len(running.plans.contexts), "set_device_memory"), "it is too small"
    with pytest.raises(BackendError, match="TensorRT does not take its scratch memory: it is too small"):
        running.pipeline.generate([1, 2], seed=0)


@pytest.mark.parametrize(
    ("name", "result", "message"),
    [
        ("set_optimization_profile_async", False, "condition: TensorRT does not take its profile 0"),
        ("set_input_shape", False, r"condition: TensorRT does not take labels \[2\]"),
        ("set_tensor_address", False, "condition: TensorRT does not take memory for labels"),
        ("infer_shapes", lambda: ["labels"], "condition: TensorRT does not take the shapes of labels"),
    ],
)
def test_what_tensorrt_refuses(running: Running, name: str, result: object, message: str) -> None:
    running.plans.results[name] = result
    with pytest.raises(BackendError, match=message):
        running.pipeline.generate([1], seed=0)


def test_shapes_that_were_refused_are_set_anew(running: Running) -> None:
    watch = lambda step, steps, preview: None  # noqa: E731
    running.plans.scratch = lambda: 1000  # nothing is set anew for the sake of a larger one
    drawn(running, 1, callback=watch)
    context = next(one for one in running.plans.contexts if one.name == "condition")
    infer_shapes = context._results["infer_shapes"]
    context._results["infer_shapes"] = lambda: ["labels"]
    with pytest.raises(BackendError, match="does not take the shapes of labels"):
        drawn(running, 2, callback=watch)
    context._results["infer_shapes"] = infer_shapes
    drawn(running, 1, callback=watch)
    *_, last = (arguments for name, arguments in context.calls if name == "set_input_shape")
    assert last == ("labels", (2,))


def test_scratch_memory_of_one_image(running: Running) -> None:
    """TensorRT names that of the largest batch, which is 4."""
    running.plans.largest_scratch = 4096
    drawn(running, 1)
    assert running.lane.scratch_of_image(["encoder", "decoder"]) == 1024


@pytest.mark.parametrize(("scratch", "fits"), [(0, "a batch of 1 fits"), (2**40, "not even one fits")])
def test_a_batch_that_does_not_fit(running: Running, scratch: int, fits: str) -> None:
    """What contexts need beside the tensors counts, too."""
    running.plans.largest_scratch = scratch
    running.pipeline.generate([1], seed=0)
    device = running.lane.device
    device.limit -= device.free_memory() - 2**16
    with pytest.raises(BackendError, match=rf"4 at once need more than \d+ MiB, \d+ MiB are free; {fits}"):
        running.pipeline.generate([1] * 4, seed=0)


def test_records_make_room_for_contexts(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enat.runtime.backends.tensorrt.CONTEXTS", 60)
    assert [drawn(running, images) for images in (1, 2, 1, 3, 3, 3, 2, 2, 1)] == [25, 25, 0, 25, 0, 0, 25, 0, 25]
    assert sum(len(record.executions) for record in running.lane.kept.values()) <= 60


def test_runs_too_long_to_be_recorded(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enat.runtime.backends.tensorrt.CONTEXTS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [drawn(running, 2), drawn(running, 2)] == [10 + 15, 10]
    with pytest.warns(
        RuntimeWarning, match="not recorded as one launch, its graphs are launched one by one: decoder: no execution context"
    ):
        assert drawn(running, 2) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn(running, 2) == drawn(running, 2) == 0


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


@pytest.mark.parametrize("kept", [False, True])
def test_weights_of_another_engine_are_not_taken(trt: Any, engine_copy: Path, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    """Whether a plan takes them from its engine's graph or from one that its build keeps, with their external data."""
    from enat.runtime.backends import tensorrt as backend_module

    (engine_copy / "encoder.onnx.data").write_bytes(b"weights")
    build = make_build(read_manifest(list_anew(engine_copy)), weights="stripped")
    names = [f"{build.folder}/{name}" if kept else name for name in ("encoder.onnx", "encoder.onnx.data")]
    graphs = {**build.graphs, "encoder": dataclasses.replace(build.graphs["encoder"], weights=names[0])}
    own = {name: engine_copy / Path(name).name for name in names} if kept else {}
    listed(engine_copy, dataclasses.replace(build, graphs=graphs), own=own)
    plans, refits = Plans(trt, engine_copy), Refits(trt, monkeypatch)
    Plans.real_runtime = trt.Runtime
    monkeypatch.setattr(trt, "Runtime", plans.runtime)
    loaded = backend_module.Plans(read_manifest(engine_copy), HERE, contextlib.nullcontext())
    (engine_copy / names[1]).write_bytes(b"others!")
    with pytest.raises(EngineError, match=rf"{re.escape(names[1])}: sha256"):
        loaded.engine("encoder")
    assert not loaded.engines and not refits.files
    (engine_copy / names[1]).write_bytes(b"weights")
    loaded.engine("encoder")
    assert refits.files == [str(engine_copy / names[0])]


@pytest.mark.parametrize("compatible", [False, True])
def test_version_compatible_plans_may_bring_programs(
    trt: Any, engine_copy: Path, monkeypatch: pytest.MonkeyPatch, compatible: bool
) -> None:
    from enat.runtime.backends import tensorrt as backend_module

    plans = Plans(trt, engine_copy)
    Plans.real_runtime = trt.Runtime
    monkeypatch.setattr(trt, "Runtime", plans.runtime)
    manifest = listed(engine_copy, make_build(read_manifest(engine_copy), version_compatible=compatible))
    assert bool(backend_module.Plans(manifest, HERE, contextlib.nullcontext()).runtime.engine_host_code_allowed) == compatible


def test_plans_that_cannot_be_used(running: Running) -> None:
    plans: Any = running.pipeline.backend.plans  # type: ignore[attr-defined]
    running.plans.keep = "DEVICE"
    with pytest.raises(BackendError, match=rf"the TensorRT build {plans.build.id} wants keep on the device"):
        plans.engine("sampler")
    graphs = {name: graph for name, graph in plans.build.graphs.items() if name != "image_encoder"}
    plans.build = dataclasses.replace(plans.build, graphs=graphs)
    with pytest.raises(BackendError, match=r"the TensorRT build [0-9a-f]+ has no image_encoder"):
        plans.engine("image_encoder")


def test_the_first_error_is_the_one_to_show(trt: Any) -> None:
    from enat.runtime.backends.tensorrt import Logger

    logger, severity = Logger(), trt.ILogger.Severity
    for kind, first in ((severity.ERROR, "why\nmore of it"), (severity.INTERNAL_ERROR, "why")):
        logger.listen()
        assert not logger.error
        for one, message in ((severity.WARNING, "what may go wrong"), (kind, first), (severity.ERROR, "what followed from it")):
            logger.log(one, message)
        assert logger.error == logger.first == "why"


def test_plans_are_hashed_when_they_are_read(running: Running, engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones too, though they were checked before: a plan is a program."""
    plans = running.pipeline.backend.plans  # type: ignore[attr-defined]
    for graph in ("encoder", "decoder"):
        plan = engine_copy / plans.build.plan(graph)
        before = plan.stat()
        plan.write_bytes(plan.read_bytes().replace(graph.encode(), graph.upper().encode()))
        if graph == "decoder":
            os.utime(plan, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had happened
        for _ in range(2):
            with pytest.raises(EngineError, match=rf"{graph}\.plan: sha256"):
                plans.engine(graph)
    assert plans.engine("sampler").name == "sampler"


def test_plans_are_tried_where_there_is_a_choice(running: Running, engine_copy: Path) -> None:
    """`auto` is to know of a plan that TensorRT or its hash refuses before it draws."""
    backend: Any = running.pipeline.backend
    backend.try_graphs()
    assert backend.plans.engines.keys() == backend.plans.build.graphs.keys() - {"image_encoder"}  # which no picture is drawn with
    backend.plans.engines.clear()
    (engine_copy / backend.plans.build.plan("decoder")).write_bytes(b"short")
    with pytest.raises(EngineError, match=r"decoder\.plan: "):
        backend.try_graphs()


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
