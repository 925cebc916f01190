"""Packages that are imported when they are first needed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Imports inside that Ctrl-C interrupts raise KeyboardInterrupt: extension modules may make an ImportError of it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    handle, interrupted = before, False

    def note(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        handle(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except ImportError as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
