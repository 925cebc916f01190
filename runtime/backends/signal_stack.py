"""The stack that a thread handles signals on, kept where it is while OpenVINO runs.

OpenVINO's CPU plugin (2026.4.1) gives every thread that enters it a stack of its own for signals, and takes it away again with the graph;
with two graphs the thread is left with one that is gone. The next signal that Python handles, Ctrl-C or a server's SIGTERM, kills the
process then.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator


class Stack(ctypes.Structure):
    """stack_t of <signal.h> on Linux."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


SIGALTSTACK = getattr(ctypes.CDLL(None), "sigaltstack", None) if sys.platform == "linux" else None


@contextlib.contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Inside, this thread's stack for signals may be replaced; at the end it is the one from before."""
    if SIGALTSTACK is None:
        yield
        return
    before, after = Stack(), Stack()
    SIGALTSTACK(None, ctypes.byref(before))
    try:
        yield
    finally:
        SIGALTSTACK(None, ctypes.byref(after))
        if after.address != before.address:
            SIGALTSTACK(ctypes.byref(before), None)
