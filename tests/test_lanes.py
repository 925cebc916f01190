"""Who gets a lane, and when what is closed is given back."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from enat import Pipeline
from enat.errors import BackendError, InputError
from enat.runtime.backends import lanes as lanes_module
from enat.runtime.backends.lanes import Lanes


class Numbered:
    """A lane that knows whether it is closed."""

    def __init__(self) -> None:
        self.closed = False

    def enter(self) -> None:
        assert not self.closed

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
        with lanes.lease():
            assert order == list(range(8))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_long_run_lets_others_in_between_its_batches(engines: Callable[[str], Path], backend: str) -> None:
    with Pipeline.load(engines("tiny"), backend) as pipe, ThreadPoolExecutor(1) as pool:
        wanted = pipe.generate([3], seed=5)
        batches = pipe.stream([1], num=1000, seed=0, batch_size=1)
        next(batches)
        other = pool.submit(pipe.generate, [3], seed=5)
        wait_for(lambda: bool(pipe.backend.lanes.waiting) or other.done())  # type: ignore[attr-defined]
        between = sum(1 for _ in itertools.takewhile(lambda _: not other.done(), batches))
        assert between < 100
        assert (other.result() == wanted).all()


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
    assert most == count == len(lanes.made) == len(lanes.free)


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
        def result(self, timeout: float | None = None) -> Any:
            if handed_over and not self.done():
                super().result(timeout)
                raise KeyboardInterrupt
            return super().result(timeout if handed_over else 0)

    monkeypatch.setattr(lanes_module, "Future", Interrupted)

    def wait() -> None:
        with lanes.lease():
            raise AssertionError("it was interrupted")

    with ThreadPoolExecutor(1) as pool:
        with lanes.lease():
            waiting = pool.submit(wait)
            wait_for(lambda: bool(lanes.waiting) or waiting.done())
        with pytest.raises(KeyboardInterrupt if handed_over else TimeoutError):
            waiting.result()
    with lanes.lease():
        assert not lanes.waiting


def test_what_is_in_use_is_closed_when_it_comes_back() -> None:
    shared: list[str] = []
    lanes = Lanes(Numbered, 2, lambda: shared.append("closed"))
    both, done = threading.Barrier(3), threading.Event()

    def use() -> Numbered:
        with lanes.lease() as lane:
            both.wait(10)
            assert done.wait(10) and not lane.closed and not shared
            return lane

    def wait() -> None:
        with lanes.lease():
            raise AssertionError("the lanes were closed")

    with ThreadPoolExecutor(3) as pool:
        users = [pool.submit(use) for _ in range(2)]
        both.wait(10)
        waiting = pool.submit(wait)
        wait_for(lambda: len(lanes.waiting) == 1)
        lanes.close()
        lanes.close()
        with pytest.raises(BackendError, match="the pipeline was closed"):
            waiting.result()
        done.set()
        assert all(user.result().closed for user in users)
    assert shared == ["closed"]
    with pytest.raises(BackendError, match="the pipeline was closed"), lanes.lease():
        pass


@pytest.mark.parametrize("slots", [1, 2])
def test_a_callback_that_would_wait_for_itself(engines: Callable[[str], Path], slots: int) -> None:
    with Pipeline.load(engines("tiny"), slots=slots) as pipe:
        for ask in (lambda: pipe.generate([1]), lambda: pipe.encode(np.zeros((1, 32, 32, 3), np.uint8))):
            with pytest.raises(InputError, match="a callback must not ask its pipeline for other pictures"):
                pipe.generate([1], callback=lambda step, steps, preview, ask=ask: bool(ask()))  # type: ignore[misc]
        assert pipe.generate([1]).shape == (1, 32, 32, 3)
