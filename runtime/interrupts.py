"""Ctrl-C and requests to end while foreign code runs that would lose them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def held_back() -> Iterator[Callable[[], bool]]:
    """Ctrl-C, SIGTERM and SIGHUP inside come at the end of the block, where the program does something with them; what is given tells
    whether one is to come. Extension modules make an ImportError of what is raised while they are imported, and TensorRT drops it where
    it is raised in a callback.

    Signals come to the main thread alone: in others nothing is held back.
    """
    before: dict[int, Callable[[int, Any], Any]] = {}
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)

    try:
        with contextlib.suppress(ValueError):  # not the main thread, or not the main interpreter
            for number in SIGNALS:
                if callable(handler := signal.getsignal(number)):  # neither ignored nor left to the system
                    before[number] = handler
                    signal.signal(number, note)
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is note:
                signal.signal(number, handler)
        for number in dict.fromkeys(asked):
            before[number](number, None)
