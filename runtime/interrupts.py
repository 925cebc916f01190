"""Ctrl-C while foreign code runs that would lose it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def held_back() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside comes at the end of the block; what is given tells whether it is to come. Extension modules make an ImportError of it
    while they are imported, and TensorRT drops it where it arrives in a callback.

    Signals come to the main thread alone: in others nothing is held back.
    """
    before, asked = signal.getsignal(signal.SIGINT), False

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True

    try:
        if not callable(before):  # ignored, or none of Python's
            raise ValueError
        signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread, or not the main interpreter
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, before)
        if asked:
            before(signal.SIGINT, None)
