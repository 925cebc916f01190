"""A backend's lanes, and who has which."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from ...errors import BackendError, InputError


class OwnLane(Protocol):
    def enter(self) -> None:
        """Makes the calling thread use the lane."""

    def close(self) -> None:
        """Gives back what the lane holds."""


AnyLane = TypeVar("AnyLane", bound=OwnLane)


class Lanes(Generic[AnyLane]):
    """One lane for each batch in flight, made when first needed. Who waits for one gets it in turn: a thread that draws batch after
    batch would otherwise take it again before the others wake up.

    close_shared: gives back what all lanes use. Like a lane that is in use, it is closed when nobody needs it any more.
    """

    def __init__(self, make: Callable[[], AnyLane], count: int, close_shared: Callable[[], object] = lambda: None) -> None:
        self.make = make
        self.close_shared = close_shared
        self.lock = threading.Lock()
        self.made: list[AnyLane] = []
        self.free: list[AnyLane | None] = [None] * count  # None: a lane that is not made yet
        self.used = 0
        self.holders: set[int] = set()  # threads
        self.waiting: deque[Future[AnyLane | None]] = deque()
        self.closed = False

    @contextlib.contextmanager
    def lease(self) -> Iterator[AnyLane]:
        """A lane for the time of a `with` block; waits while all are taken.

        Raises BackendError once the lanes are closed, InputError for a thread that has one already and might wait for itself.
        """
        thread = threading.get_ident()
        if thread in self.holders:
            raise InputError("a callback must not ask its pipeline for other pictures: the batch being drawn holds the slot")
        lane = self.take()
        self.holders.add(thread)
        try:
            if lane is None:
                lane = self.make()
                self.made.append(lane)
            lane.enter()
            yield lane
        finally:
            self.holders.discard(thread)
            self.give(lane)

    def take(self) -> AnyLane | None:
        with self.lock:
            if self.closed:
                raise closed()
            if self.free:
                self.used += 1
                return self.free.pop()
            turn: Future[AnyLane | None] = Future()
            self.waiting.append(turn)
        try:
            return turn.result()
        except BaseException:  # interrupted, or the lanes were closed
            with self.lock:
                given = turn not in self.waiting and not turn.exception()
                if turn in self.waiting:
                    self.waiting.remove(turn)
            if given:
                self.give(turn.result())
            raise

    def give(self, lane: AnyLane | None) -> None:
        with self.lock:
            if self.waiting:
                self.waiting.popleft().set_result(lane)
                return
            self.used -= 1
            if not self.closed:
                self.free.append(lane)
                return
            last = not self.used
        if lane is not None:
            lane.close()
        if last:
            self.close_rest()

    def close(self) -> None:
        """Closes what is not in use; the rest when it is given back. Who waits for a lane is refused."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            free, self.free = self.free, []
            waiting, self.waiting = self.waiting, deque()
            last = not self.used
        for turn in waiting:
            turn.set_exception(closed())
        for lane in free:
            if lane is not None:
                lane.close()
        if last:
            self.close_rest()

    def close_rest(self) -> None:
        self.made.clear()
        self.close_shared()


def closed() -> BackendError:
    return BackendError("the pipeline was closed")
