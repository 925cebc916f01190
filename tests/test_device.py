"""Lanes on a device, on host memory in its place: same pictures, memory used again, runs recorded and launched."""

from __future__ import annotations

import gc
import itertools
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host_device import HostBackend, HostDevice, HostLane, lanes_made
from hypothesis import given, settings
from hypothesis import strategies as st

from enat import Pipeline, Stopped
from enat.errors import BackendError
from enat.runtime.backends.device import Arena, Block, DeviceMemoryError, rounded
from enat.runtime.backends.lanes import Lanes
from enat.runtime.backends.onnxruntime_cuda import OrtLane
from enat.runtime.pipeline import Preview
from enat.runtime.progress import NoBar


@pytest.fixture(scope="module")
def pipe(engines: Callable[[str], Path]) -> Iterator[Pipeline]:
    with Pipeline.load(engines("tiny")) as pipeline:
        yield pipeline


@pytest.fixture
def host(pipe: Pipeline) -> Iterator[Pipeline]:
    with Pipeline(pipe.manifest, HostBackend(pipe.manifest)) as pipeline:
        yield pipeline


def lane_of(pipeline: Pipeline) -> HostLane:
    (lane,) = pipeline.backend.lanes.free  # type: ignore[attr-defined]
    return lane  # type: ignore[no-any-return]


@pytest.mark.parametrize("steps", [1, 2, 8, 64])
@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_pictures_are_those_of_the_cpu(pipe: Pipeline, host: Pipeline, steps: int, guidance: float) -> None:
    """Run, recorded, launched: with other classes, seeds and settings every time."""
    for run in range(4):
        request: dict[str, Any] = {
            "classes": [run, 3, 2 * run],
            "seed": 100 * run,
            "steps": steps,
            "guidance": guidance * (1 + run),
            "sampling_temperature": 1.0 + run,
        }
        assert (host.generate(**request) == pipe.generate(**request)).all()
        assert (host.generate_tokens(**request) == pipe.generate_tokens(**request)).all()
    assert len(lane_of(host).kept) == 2  # of pictures, and of tokens


def test_guided_runs_and_others_are_not_taken_for_each_other(pipe: Pipeline, host: Pipeline) -> None:
    """A record of one has other rows than the other needs."""
    for run in range(3):
        for guidance in (2.5, 0.0):
            request: dict[str, Any] = {"classes": [run, 3], "seed": run, "steps": 4, "guidance": guidance}
            assert (host.generate(**request) == pipe.generate(**request)).all()


def test_a_record_is_launched_without_the_loop(host: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    run = HostLane.run

    def counting(self: HostLane, graph: str, inputs: Any) -> Any:
        calls.append(graph)
        return run(self, graph, inputs)

    monkeypatch.setattr(HostLane, "run", counting)
    counts = []
    for seed in range(4):
        host.generate([1, 2], seed=seed, steps=8)
        counts.append(len(calls))
    assert counts == [25, 50, 50, 50]  # condition, 8 decoders and samplers, 7 encoders, image decoder
    host.generate([1, 2, 3], seed=0, steps=8)  # another batch is another record
    assert len(calls) == 75


def test_progress(pipe: Pipeline, host: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps of all batches are counted, also where a record runs without the loop; and it is recorded all the same."""
    bars: list[tuple[int, NoBar]] = []

    def progress_bar(total: int, *_: object) -> NoBar:
        bars.append((total, NoBar()))
        return bars[-1][1]

    monkeypatch.setattr("enat.runtime.pipeline.progress_bar", progress_bar)
    for pipeline in (pipe, host):
        pipeline.generate([1, 2, 3], steps=4, batch_size=2, progress=True)
    assert [(total, bar.n) for total, bar in bars] == [(8, 8), (8, 8)]
    assert len(lane_of(host).kept) == 2


class LateDevice(HostDevice):
    """What is launched runs when somebody waits for it, and not before, as on a GPU that is busy."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[Callable[[], Any]] = []

    def do(self, operation: Callable[[], Any]) -> None:
        if self.recorded is None:
            self.launched.append(operation)
        else:
            super().do(operation)

    def synchronize(self) -> None:
        super().synchronize()
        launched, self.launched = self.launched, []  # which may wait themselves
        for operation in launched:
            operation()

    def free(self, address: int) -> None:
        self.synchronize()
        super().free(address)

    def record(self, launch: Callable[[], Any]) -> Callable[[], None]:
        run = super().record(launch)
        return lambda: self.do(run)


@pytest.mark.parametrize("lane", [HostLane, OrtLane])
def test_whoever_reads_waits(pipe: Pipeline, lane: type[OrtLane]) -> None:
    """For graphs that were launched; and where they run at once, for what was copied before them."""
    backend = HostBackend(pipe.manifest)
    backend.lanes = Lanes(lambda: lane(pipe.manifest, LateDevice(), backend.sessions, "cpu"), 1)  # type: ignore[assignment]
    with Pipeline(pipe.manifest, backend) as late:
        for run in range(4):
            assert (late.generate([1, 2], seed=run) == pipe.generate([1, 2], seed=run)).all()


def test_records_of_many_shapes_share_memory(pipe: Pipeline, host: Pipeline) -> None:
    """A record's memory is used by others between its launches, and neither spoils the other's pictures."""
    expected = {(n, s): pipe.generate(list(range(n)), seed=n, steps=s) for n in (1, 2, 5) for s in (3, 8)}
    for repeat in range(4):
        for (n, s), pictures in expected.items():
            assert (host.generate(list(range(n)), seed=n, steps=s) == pictures).all(), (repeat, n, s)
        if repeat == 1:
            total = lane_of(host).arena.total
    assert lane_of(host).arena.total == total


def test_a_stream_holds_no_slot_between_its_batches(pipe: Pipeline, host: Pipeline) -> None:
    for pictures in host.stream([1, 2, 3], seed=0, batch_size=1):
        assert (host.encode(pictures) == pipe.encode(pictures)).all()


def test_what_was_closed_is_not_used_again(pipe: Pipeline) -> None:
    with Pipeline(pipe.manifest, HostBackend(pipe.manifest)) as pipeline:
        batches = pipeline.stream([1, 2], seed=0, batch_size=1)
        next(batches)
    with pytest.raises(BackendError, match="the pipeline was closed"):
        next(batches)
    with pytest.raises(BackendError, match="the pipeline was closed"):
        pipeline.generate([1])


def test_old_records_make_room_for_new_ones(pipe: Pipeline, host: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enat.runtime.backends.device_lane.RECORDS", 2)
    for steps in (2, 3, 4, 2, 3, 4, 4, 4):
        assert (host.generate([1], seed=0, steps=steps) == pipe.generate([1], seed=0, steps=steps)).all()
    assert len(lane_of(host).kept) == 2


def test_memory_is_given_back(pipe: Pipeline) -> None:
    with Pipeline(pipe.manifest, HostBackend(pipe.manifest)) as pipeline:
        for _ in range(3):
            pipeline.generate([1, 2], seed=0)
        lane = lane_of(pipeline)
        assert lane.device.pieces
    assert not lane.device.pieces


def test_memory_of_what_nobody_refers_to_is_given_back(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread of its own: the one that lets go of it may be using another device."""
    threads: list[int] = []
    monkeypatch.setattr(HostDevice, "enter", lambda self: threads.append(threading.get_ident()))
    gc.disable()
    try:
        pipeline = Pipeline(pipe.manifest, HostBackend(pipe.manifest))
        pipeline.generate([1], seed=0)
        device = lane_of(pipeline).device
        assert device.pieces
        threads.clear()
        del pipeline
        deadline = time.monotonic() + 10
        while device.pieces and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        gc.enable()
    assert not device.pieces
    assert len(threads) == 1 and threads != [threading.get_ident()]


def test_a_device_is_closed_in_the_thread_that_closes_its_lane(host: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not have used it before."""
    host.generate([1], seed=0)
    calls: list[str] = []
    monkeypatch.setattr(HostDevice, "enter", lambda self: calls.append("enter"))
    monkeypatch.setattr(HostDevice, "close", lambda self: calls.append("close"))
    host.close()
    assert calls == ["enter", "close"]


def test_memory_of_a_run_that_ended_early_is_given_back(pipe: Pipeline) -> None:
    """An exception holds the batch's tensors while the pipeline is closed, and previews beyond that."""
    previews: list[Preview] = []
    pipeline = Pipeline(pipe.manifest, HostBackend(pipe.manifest))
    pipeline.generate([1, 2])
    lane = lane_of(pipeline)

    def stop(step: int, steps: int, preview: Preview) -> bool:
        previews.append(preview)
        pipeline.close()
        return True

    with pytest.raises(Stopped) as raised:
        pipeline.generate([1, 2], callback=stop)
    assert lane.device.pieces
    del raised
    previews.clear()
    gc.collect()
    assert not lane.device.pieces


def test_encode_decode_and_previews(pipe: Pipeline, host: Pipeline) -> None:
    pictures, tokens = pipe.generate([1, 2], seed=0), pipe.generate_tokens([1, 2], seed=0)
    assert (host.decode(tokens) == pictures).all()
    for layout in (pictures, np.asfortranarray(pictures)):
        assert (host.encode(layout) == pipe.encode(pictures)).all()

    def previews(pipeline: Pipeline) -> list[np.ndarray]:
        seen: list[np.ndarray] = []

        def keep(step: int, steps: int, preview: Preview) -> None:
            seen.extend((preview(), preview.masked()))

        pipeline.generate([1, 2], seed=0, callback=keep)
        return seen

    for found, wanted in zip(previews(host), previews(pipe), strict=True):
        assert (found == wanted).all()
    with pytest.raises(Stopped):
        host.generate([1], seed=0, callback=lambda step, steps, preview: True)
    assert (host.generate([1, 2], seed=0) == pictures).all()


def test_several_batches_in_flight(pipe: Pipeline) -> None:
    backend = HostBackend(pipe.manifest, slots=3)
    made = lanes_made(backend)
    with Pipeline(pipe.manifest, backend) as pipeline, ThreadPoolExecutor(8) as pool:
        seeds = range(40)
        found = list(pool.map(lambda seed: pipeline.generate([seed % 10], seed=seed), seeds))
        assert len(made) <= 3
    for seed, pictures in zip(seeds, found, strict=True):
        assert (pictures == pipe.generate([seed % 10], seed=seed)).all()


def test_nothing_is_set_up_while_another_lane_records(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's records do not survive all that other lanes do when they run something for the first time."""
    recording, wanted = threading.Event(), threading.Event()
    record, run_first, inside = HostDevice.record, HostLane.run_first, []

    def slow_record(self: HostDevice, launch: Callable[[], Any]) -> Callable[[], None]:
        recording.set()
        assert wanted.wait(60)
        time.sleep(0.1)  # in which the other one would begin
        inside.append("record")
        return record(self, launch)

    def first(self: HostLane, *arguments: Any) -> Any:
        inside.append("first")
        return run_first(self, *arguments)

    monkeypatch.setattr(HostLane, "run_first", first)
    with Pipeline(pipe.manifest, HostBackend(pipe.manifest, slots=2)) as pipeline, ThreadPoolExecutor(2) as pool:
        pipeline.generate([1], seed=0)
        monkeypatch.setattr(HostDevice, "record", slow_record)
        one = pool.submit(pipeline.generate, [1], seed=1)
        assert recording.wait(60)
        other = pool.submit(pipeline.generate, [1, 2], seed=2)
        wanted.set()
        assert (one.result() == pipe.generate([1], seed=1)).all() and (other.result() == pipe.generate([1, 2], seed=2)).all()
    assert inside == ["first", "record", "first"]


@pytest.mark.parametrize(("failures", "error"), [(1, BackendError), (2, BackendError), (1, DeviceMemoryError)])
def test_a_record_that_fails_is_tried_once_more(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, failures: int, error: type[BackendError]
) -> None:
    """But not where memory was short: no more of it is given back next time."""
    tried: list[int] = []
    record = HostDevice.record

    def failing(self: HostDevice, launch: Callable[[], Any]) -> Callable[[], None]:
        tried.append(1)
        run = record(self, launch)
        if len(tried) <= failures:
            raise error("spoilt by another")
        return run

    monkeypatch.setattr(HostDevice, "record", failing)
    with Pipeline(pipe.manifest, HostBackend(pipe.manifest)) as pipeline, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for seed in range(5):
            assert (pipeline.generate([1, 2], seed=seed) == pipe.generate([1, 2], seed=seed)).all()
        (kept,) = lane_of(pipeline).kept.values()
    recorded = error is BackendError and failures == 1
    assert len(tried) == (1 if error is DeviceMemoryError else 2)
    assert (kept.launch is not None) == recorded
    assert [str(one.message) for one in warned] == (
        [] if recorded else ["not recorded as one launch, its graphs are launched one by one: spoilt by another"]
    )


def test_a_batch_that_does_not_fit(pipe: Pipeline) -> None:
    """The message names a batch, and that batch fits."""
    with Pipeline(pipe.manifest, HostBackend(pipe.manifest, limit=6 * 2**20)) as pipeline:
        pipeline.generate([1], seed=0)
        with pytest.raises(BackendError, match=r"out of memory; 40 at once need more than .* MiB are free; a batch of (\d+) fits") as info:
            pipeline.generate([1] * 40, seed=0, batch_size=40)
        steps: list[int] = []
        with pytest.raises(BackendError, match="a batch of"):  # nobody is shown tensors that were only counted
            pipeline.generate([1] * 40, seed=0, batch_size=40, callback=lambda step, total, preview: steps.append(step))
        assert steps == sorted(set(steps))
        fitting = int(str(info.value).split()[-2])
        assert 1 <= fitting <= 20
        pictures = pipeline.generate([1] * fitting, seed=0, batch_size=fitting)
    assert (pictures == pipe.generate([1] * fitting, seed=0)).all()


def test_pictures_to_encode_that_do_not_fit(pipe: Pipeline) -> None:
    with (
        Pipeline(pipe.manifest, HostBackend(pipe.manifest, limit=2**16)) as pipeline,
        pytest.raises(BackendError, match=r"out of memory; 40 at once need more than .* MiB"),
    ):
        pipeline.encode(np.zeros((40, 32, 32, 3), np.uint8), batch_size=40)


def test_no_memory_is_given_back_while_a_record_is_made(pipe: Pipeline, host: Pipeline) -> None:
    """The record goes on using what it was made with."""
    host.generate([1], seed=0)
    lane = lane_of(host)
    lane.arena.free_unused()
    lane.device.limit -= lane.device.free_memory()
    with pytest.warns(RuntimeWarning, match="not recorded"), pytest.raises(BackendError, match="1 at once need more than"):
        host.generate([1], seed=1)
    lane.device.limit = 2**40
    assert (host.generate([1], seed=1) == pipe.generate([1], seed=1)).all()


@pytest.mark.parametrize(
    ("said", "short"),
    [
        ("Failed to allocate memory for requested buffer of size 1", True),
        ("CUDA error: out of memory", True),
        ("cuDNN failure 4: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOCATION_FAILED", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_memory_that_onnxruntime_lacks(host: Pipeline, monkeypatch: pytest.MonkeyPatch, said: str, short: bool) -> None:
    """A launch that fails for want of it names the batch that fits, one that fails otherwise the reason."""
    sessions = host.backend.sessions  # type: ignore[attr-defined]
    session = sessions.get("condition")

    def fail(binding: object) -> None:
        raise RuntimeError(f"{said}\nand more")

    failing = SimpleNamespace(io_binding=session.io_binding, get_outputs=session.get_outputs, run_with_iobinding=fail)
    monkeypatch.setitem(sessions.sessions, "condition", failing)
    advice = "; 4 at once need more than .* MiB are free; a batch of 2 fits" if short else ""
    with pytest.raises(BackendError, match=rf"condition\.onnx: ONNX Runtime failed: {re.escape(said)}{advice}$"):
        host.generate([1] * 4, seed=0)


@pytest.mark.parametrize(("name", "index"), [("cuda:3", 3), ("cuda", 0)])
def test_memory_is_bound_on_its_own_gpu(pipe: Pipeline, host: Pipeline, name: str, index: int) -> None:
    device = HostDevice()
    device.name = name
    assert OrtLane(pipe.manifest, device, host.backend.sessions, "cuda").index == index  # type: ignore[attr-defined]


def test_memory_held_by_records_is_given_up_where_it_is_short(pipe: Pipeline) -> None:
    with Pipeline(pipe.manifest, HostBackend(pipe.manifest)) as measure:
        measure.generate([1] * 8, seed=0)
        needed = lane_of(measure).arena.total
    with Pipeline(pipe.manifest, HostBackend(pipe.manifest, limit=needed + needed // 4)) as pipeline:
        for images in (1, 2, 3, 4, 5, 6, 7, 8):
            for _ in range(2):
                labels = list(range(images))
                assert (pipeline.generate(labels, seed=0) == pipe.generate(labels, seed=0)).all()


@given(st.lists(st.tuples(st.integers(0, 5000), st.booleans()), max_size=60))
@settings(max_examples=50)
def test_blocks_in_use_never_overlap(requests: list[tuple[int, bool]]) -> None:
    device = HostDevice()
    arena = Arena(device)
    held: list[tuple[Block, int]] = []
    for size, give_back in requests:
        block = arena.take(size)
        assert size <= block.size
        device.at(block.address, block.size)
        spans = sorted((other.address, other.address + other.size) for other, _ in [*held, (block, size)])
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        held.append((block, size))
        if give_back:
            del held[0]
        del block
    held.clear()
    arena.free_unused()
    assert arena.total == 0 and not device.pieces


def test_freeing_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was freed is not given out again; other threads let go of blocks meanwhile."""
    device = HostDevice()
    arena = Arena(device)
    late = [arena.take(512 << i) for i in range(10)]
    del [arena.take(size) for size in (1000, 1000, 5000, 9000)][:]
    free = device.free

    def interrupted(address: int) -> None:
        free(address)
        late.pop()
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(device, "free", interrupted)
            arena.free_unused()
        assert arena.total == sum(len(piece) for piece in device.pieces.values())
        block = arena.take(1000)
        device.at(block.address, block.size)
        del block
    late.clear()
    arena.close()
    assert arena.total == 0 and not device.pieces


@given(st.integers(0, 2**40))
def test_sizes_are_rounded_up_a_little(size: int) -> None:
    assert size <= rounded(size) <= max(512, size * 9 // 8 + 512)
    assert rounded(size) % 512 == 0
