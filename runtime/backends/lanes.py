"""A backend's lanes, and who has which."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

from ...errors import BackendError, InputError


class Closable(Protocol):
    def enter(self) -> None:
        """Makes the calling thread use the lane."""

    def close(self) -> None:
        """Gives back what the lane holds."""


AnyLane = TypeVar("AnyLane", bound=Closable)
CLOSED = "the pipeline was closed"


class LaneBackend(Generic[AnyLane]):
    """What a backend does whose graphs its lanes run."""

    lanes: Lanes[AnyLane]

    def lease(self) -> AbstractContextManager[AnyLane]:
        return self.lanes.lease()

    def try_graphs(self) -> None:
        """Nothing to do for a backend that is sure of them once it is loaded, or that auto tries last."""

    def close(self) -> None:
        self.lanes.close()


class DeviceBackend(LaneBackend[AnyLane]):
    """One whose lanes hold what Python does not give back by itself: they are closed when nobody refers to the backend any more."""

    def __init__(self, lanes: Lanes[AnyLane]) -> None:
        self.lanes = lanes
        weakref.finalize(self, close_apart, lanes).atexit = False  # the end of the process gives everything back


def close_apart(lanes: Lanes[Any]) -> None:
    """Closes lanes in a thread of its own. Whichever thread lets go of the last reference may be in the midst of another batch, on another
    device, or hold a lock."""
    if not lanes.closed and not lanes.inherited:
        threading.Thread(target=lanes.close, daemon=True).start()


ALL: weakref.WeakSet[Lanes[Any]] = weakref.WeakSet()


def inherit_all() -> None:
    for lanes in ALL:
        lanes.inherit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=inherit_all)


class Lanes(Generic[AnyLane]):
    """One lane for each batch in flight, made when first needed. Who waits for one gets it in turn: a thread that draws batch after
    batch would otherwise take it again before the others wake up.

    close_shared: gives back what all lanes use, when the last of them is closed. A lane that is in use is closed when it is given back.
    """

    def __init__(self, make: Callable[[], AnyLane], count: int, close_shared: Callable[[], object] = lambda: None) -> None:
        self.make = make
        self.close_shared = close_shared
        self.lock = threading.Lock()
        self.free: list[AnyLane | None] = [None] * count  # None: a lane that is not made yet
        self.open = count  # lanes that are not closed
        self.holders: set[int] = set()  # threads
        self.waiting: deque[Future[AnyLane | None]] = deque()
        self.closed = False
        self.inherited = False  # by a process that was forked
        self.lost = False  # lanes, to threads of the process that it was forked from
        ALL.add(self)

    @contextlib.contextmanager
    def lease(self) -> Iterator[AnyLane]:
        """A lane for the time of a `with` block; waits while all are taken.

        Raises BackendError once the lanes are closed, or in a process that was forked while they were in use, InputError for a thread
        that has one already and might wait for itself.
        """
        if self.lost:
            raise BackendError("the pipeline was drawing when this process was forked; load it here, or start processes by spawn")
        thread = threading.get_ident()
        if thread in self.holders:
            raise InputError("a callback must not ask its pipeline for other pictures: the batch being drawn holds the slot")
        turn: Future[AnyLane | None] = Future()
        lane = None
        try:
            self.ask(turn)
            lane = turn.result()
            self.holders.add(thread)
            if lane is None:
                lane = self.make()
            lane.enter()
            yield lane
        finally:
            self.holders.discard(thread)
            self.end(turn, lane)

    def inherit(self) -> None:
        """In a process that was just forked. Threads that hold lanes are not in it, and would never give them back. Nor are those of
        libraries, which wait for them when what they made is taken down: that is left to the end of the process, and kept from Python
        there."""
        self.inherited = True
        self.lost = self.lock.locked() or len(self.free) < self.open  # one that is handed on has no holder for a moment
        self.lock = threading.Lock()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def ask(self, turn: Future[AnyLane | None]) -> None:
        """Has the turn get a lane, now or when it is its turn. Raises BackendError."""
        with self.lock:
            if self.closed:
                raise BackendError(CLOSED)
            if self.free:
                turn.set_result(self.free.pop())
            else:
                self.waiting.append(turn)

    def end(self, turn: Future[AnyLane | None], lane: AnyLane | None) -> None:
        """Gives back what the turn got, if it got anything; lane: what was made of it."""
        with self.lock:
            if turn in self.waiting:  # interrupted
                self.waiting.remove(turn)
        if turn.done() and not turn.exception():
            self.give(lane or turn.result())

    def give(self, lane: AnyLane | None) -> None:
        """Hands a lane to the next one who waits."""
        with self.lock:
            if self.waiting:
                self.waiting.popleft().set_result(lane)
                return
            if not self.closed or self.inherited:
                self.free.append(lane)
                return
        try:
            if lane is not None:
                lane.close()
        finally:
            with self.lock:
                self.open -= 1
                last = not self.open
            if last:
                self.close_shared()

    def close(self) -> None:
        """Closes what is not in use; the rest when it is given back. Who waits for a lane is refused."""
        with self.lock:
            self.closed = True
            free: list[AnyLane | None] = []
            if not self.inherited:
                free, self.free = self.free, free
            while self.waiting:
                self.waiting.popleft().set_exception(BackendError(CLOSED))
        with contextlib.ExitStack() as stack:  # each of them, whatever closing another one raises
            for lane in free:
                stack.callback(self.give, lane)
