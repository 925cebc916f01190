"""Who gets a lane, when what is closed is given back, and what one runs at once."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from enat import Pipeline
from enat.errors import BackendError, InputError
from enat.runtime.backends import lanes as lanes_module
from enat.runtime.backends import onnxruntime_cpu
from enat.runtime.backends.lanes import Lanes
from enat.runtime.backends.onnxruntime_cpu import OnnxRuntimeLane
from enat.runtime.pipeline import Drawing, Preview


class Numbered:
    """A lane that knows whether it is closed."""

    def __init__(self) -> None:
        self.closed = False
        self.entered = 0

    def enter(self) -> None:
        assert not self.closed
        self.entered += 1

    def close(self) -> None:
        assert not self.closed
        self.closed = True


@pytest.fixture
def lanes() -> Iterator[Lanes[Numbered]]:
    lanes = Lanes(Numbered, 1)
    yield lanes
    lanes.close()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_in_turn(lanes: Lanes[Numbered]) -> None:
    """Who takes a lane again and again lets those who wait have it between, in the order in which they came."""
    order: list[int] = []

    def one(number: int) -> None:
        with lanes.lease():
            order.append(number)

    with ThreadPoolExecutor(8) as pool:
        with lanes.lease():
            for number in range(8):
                pool.submit(one, number)
                wait_for(lambda number=number: len(lanes.waiting) == number + 1)  # type: ignore[misc]
        with lanes.lease() as lane:
            assert order == list(range(8))
    assert lane.entered == 10  # by each, as GPUs are used by threads


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_long_run_lets_others_in_between_its_batches(engines: Callable[[str], Path], backend: str) -> None:
    others: list[Future[Any]] = []
    with Pipeline.load(engines("tiny"), backend) as pipe, ThreadPoolExecutor(1) as pool:
        wanted = pipe.generate([3], seed=5)

        def ask(step: int, steps: int, preview: Preview) -> None:
            if not others:
                others.append(pool.submit(pipe.generate, [3], seed=5))
                wait_for(lambda: len(pipe.backend.lanes.waiting) == 1)  # type: ignore[attr-defined]

        batches = pipe.stream([1], num=100, seed=0, batch_size=1, callback=ask)
        next(batches)
        next(batches)
        assert others[0].done() or not pipe.backend.lanes.waiting  # type: ignore[attr-defined]
        assert (others[0].result(60) == wanted).all()
        batches.close()


@pytest.mark.parametrize("count", [1, 3])
def test_no_more_at_once_than_there_are(count: int) -> None:
    lanes, used, most, lock = Lanes(Numbered, count), 0, 0, threading.Lock()

    def one(_: int) -> None:
        nonlocal used, most
        with lanes.lease():
            with lock:
                used += 1
                most = max(most, used)
            time.sleep(0.002)
            with lock:
                used -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(60)))
    assert most == count == len(lanes.free)


def test_a_lane_that_cannot_be_made_is_tried_again() -> None:
    tries = iter((MemoryError("none left"), None))

    def make() -> Numbered:
        error = next(tries)
        if error:
            raise error
        return Numbered()

    lanes = Lanes(make, 1)
    with pytest.raises(MemoryError), lanes.lease():
        pass
    with lanes.lease() as lane:
        assert not lane.closed


@pytest.mark.parametrize("handed_over", [False, True])
def test_who_stops_waiting_takes_no_lane_along(lanes: Lanes[Numbered], monkeypatch: pytest.MonkeyPatch, handed_over: bool) -> None:
    """Interrupted before the lane was handed over or right after, the next one gets it."""

    class Interrupted(Future[Any]):
        interrupted = False

        def result(self, timeout: float | None = None) -> Any:
            if self.interrupted:
                return super().result(0)
            self.interrupted = True
            if handed_over:
                super().result(timeout)
            raise KeyboardInterrupt

    def wait() -> None:
        with lanes.lease():
            raise AssertionError("it was interrupted")

    with ThreadPoolExecutor(1) as pool:
        with lanes.lease():
            monkeypatch.setattr(lanes_module, "Future", Interrupted)
            waiting = pool.submit(wait)
            wait_for((lambda: bool(lanes.waiting)) if handed_over else waiting.done)
        with pytest.raises(KeyboardInterrupt):
            waiting.result(10)
    monkeypatch.undo()
    with lanes.lease():
        assert not lanes.waiting


def test_what_is_in_use_is_closed_when_it_comes_back() -> None:
    """And what all share behind the last of them, although closing another one failed."""
    order: list[str] = []

    class Failing(Numbered):
        def close(self) -> None:
            super().close()
            time.sleep(0.01)
            order.append("lane")
            if len(order) == 1:
                raise MemoryError("the first")

    lanes = Lanes(Failing, 3, lambda: order.append("shared"))
    all_in, done = threading.Barrier(3), threading.Event()

    def use(stay: bool) -> Numbered:
        with lanes.lease() as lane:
            all_in.wait(10)
            assert not stay or (done.wait(10) and not lane.closed)
            return lane

    with ThreadPoolExecutor(3) as pool:
        users = [pool.submit(use, stay) for stay in (True, True, False)]
        assert not users[-1].result(10).closed
        with pytest.raises(MemoryError):
            lanes.close()
        assert order == ["lane"] and users[-1].result().closed
        done.set()
        assert all(user.result(10).closed for user in users)
    assert order == ["lane", "lane", "lane", "shared"]


def test_who_waits_for_what_is_closed_is_refused(lanes: Lanes[Numbered]) -> None:
    def wait() -> None:
        with lanes.lease():
            raise AssertionError("the lanes were closed")

    with ThreadPoolExecutor(1) as pool, lanes.lease() as used:
        waiting = pool.submit(wait)
        wait_for(lambda: len(lanes.waiting) == 1)
        lanes.close()
        lanes.close()
        with pytest.raises(BackendError, match="the pipeline was closed"):
            waiting.result(10)
        assert not used.closed
    assert used.closed
    with pytest.raises(BackendError, match="the pipeline was closed"), lanes.lease():
        pass


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_what_nobody_refers_to_is_gone(engines: Callable[[str], Path], backend: str) -> None:
    """At once, not when the garbage collector next looks for cycles: a network is large."""
    gc.disable()
    try:
        pipe = Pipeline.load(engines("tiny"), backend)
        pipe.generate([1])
        kept = pipe.backend.graphs if backend == "openvino" else pipe.backend.sessions  # type: ignore[attr-defined]
        gone = [weakref.ref(pipe.backend), weakref.ref(kept)]
        del pipe, kept
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_graphs_are_given_back_when_a_pipeline_is_closed(
    engines: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Although somebody still refers to it."""
    monkeypatch.setenv("ENAT_CACHE", "")
    with Pipeline.load(engines("tiny"), backend) as pipe:
        pipe.generate([1])
        opened: Any = pipe.backend
        graphs = opened.graphs.loading if backend == "openvino" else opened.sessions.sessions
        assert graphs
    assert not graphs
    if backend == "openvino":
        with pytest.raises(RuntimeError, match="shutdown"):
            opened.graphs.loader.submit(print)


def test_a_process_that_is_forked(lanes: Lanes[Numbered], tmp_path: Path) -> None:
    """While another thread draws, which is not in it and would never be done: it is refused. Else it goes on."""

    def in_child(name: str) -> str:
        process = os.fork()
        if not process:
            signal.alarm(20)
            try:
                with lanes.lease():
                    (tmp_path / name).write_text("drawn")
            except BackendError as error:
                (tmp_path / name).write_text(str(error))
            finally:
                os._exit(0)
        os.waitpid(process, 0)
        return (tmp_path / name).read_text()

    def hold() -> None:
        with lanes.lease():
            time.sleep(0.1)

    assert in_child("idle") == "drawn"
    with ThreadPoolExecutor(1) as pool, lanes.lease():
        assert pool.submit(in_child, "busy").result().startswith("the pipeline was drawing when this process was forked")
    assert in_child("idle again") == "drawn"
    with ThreadPoolExecutor(1) as pool:
        with lanes.lease():
            waiting = pool.submit(hold)
            wait_for(lambda: bool(lanes.waiting))
        assert in_child("handed on").startswith("the pipeline was drawing")  # to a thread that has not woken up yet
        waiting.result()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("close", ["", "pipeline.close()", "del pipeline"])
def test_a_process_that_is_forked_comes_to_an_end(engines: Callable[[str], Path], backend: str, close: str) -> None:
    """Threads of ONNX Runtime and OpenVINO, for which they wait when they are taken down, are not in it."""
    code = f"""
import os
from enat import Pipeline
pipeline = Pipeline.load({str(engines("tiny"))!r}, {backend!r})
pipeline.generate(1, seed=1)
if not os.fork():
    print(pipeline.generate(1, seed=1).sum())
    {close}
else:
    _, status = os.wait()
    print(pipeline.generate(1, seed=1).sum(), status)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    child, parent = said.splitlines()
    assert parent == f"{child} 0"


@pytest.mark.parametrize("slots", [1, 2])
def test_a_callback_that_would_wait_for_itself(engines: Callable[[str], Path], slots: int) -> None:
    with Pipeline.load(engines("tiny"), slots=slots) as pipe:
        for ask in (lambda: pipe.generate([1]), lambda: pipe.encode(np.zeros((1, 32, 32, 3), np.uint8))):
            with pytest.raises(InputError, match="a callback must not ask its pipeline for other pictures"):
                pipe.generate([1], callback=lambda step, steps, preview, ask=ask: bool(ask()))  # type: ignore[misc]
        assert pipe.generate([1]).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_large_batches_go_through_the_network_in_parts(
    engines: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """ONNX Runtime's; guided or not, and where a step reveals nothing."""
    settings: list[Drawing] = [{"steps": 4}, {"steps": 3, "guidance": 0}, {"steps": 20}]
    with Pipeline.load(engines("tiny"), "onnxruntime") as pipe:
        expected = [pipe.generate(range(5), seed=3, **one) for one in settings]
        model = pipe.manifest.model
        assert any(step.index and step.new == 0 for step in pipe.schedule(20))
    monkeypatch.setattr(onnxruntime_cpu, "FEATURES", at_once * model.length * model.dim / 2)
    ran: list[tuple[str, int]] = []
    run_once = OnnxRuntimeLane.run_once

    def listening(lane: OnnxRuntimeLane, graph: str, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        ran.append((graph, len(inputs["positions"]) if "positions" in inputs else 0))
        return run_once(lane, graph, inputs)

    monkeypatch.setattr(OnnxRuntimeLane, "run_once", listening)
    with Pipeline.load(engines("tiny"), "onnxruntime", threads=2) as pipe:
        for one, pictures in zip(settings, expected, strict=True):
            assert (pipe.generate(range(5), seed=3, **one) == pictures).all()
    sizes = {graph: {count for name, count in ran if name == graph} for graph in ("encoder", "decoder", "sampler", "image_decoder")}
    parts = {at_once, 5 % at_once} - {0}
    assert sizes == {"encoder": parts, "decoder": parts, "sampler": {5}, "image_decoder": {1}}
