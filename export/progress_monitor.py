"""TensorRT's build progress as a bar."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import tensorrt as trt

from ..runtime.backends.tensorrt import LOGGER
from ..runtime.progress import progress_bar


class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc]
    """A bar of the outermost phase that TensorRT is in. Ctrl-C ends the build at its next step; `interrupted` tells of it.

    TensorRT calls it from any of its threads.
    """

    def __init__(self, graph: str) -> None:
        super().__init__()
        self.graph = graph
        self.outermost: str | None = None
        self.bar = progress_bar(0, "step")
        self.lock = threading.Lock()
        self.interrupted = False

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        try:
            with self.lock:
                yield
        except KeyboardInterrupt:  # which TensorRT would not pass on
            self.interrupted = True

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self.drawing():
            if parent_phase is None:
                self.outermost = phase_name
                self.bar.close()
                self.bar = progress_bar(num_steps, "step", description=f"{self.graph}: {phase_name}")

    def step_complete(self, phase_name: str, step: int) -> bool:
        with self.drawing():
            if phase_name == self.outermost:
                self.bar.update(step + 1 - self.bar.n)
        return not (self.interrupted or LOGGER.interrupted)

    def phase_finish(self, phase_name: str) -> None:
        with self.drawing():
            if phase_name == self.outermost:
                self.outermost = None
                self.bar.close()
