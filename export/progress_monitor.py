"""TensorRT's build progress as a bar."""

from __future__ import annotations

import threading
from collections.abc import Callable

import tensorrt as trt

from ..runtime.progress import progress_bar


class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc]
    """A bar of the outermost phase that TensorRT is in, where it is to be shown. The build ends at its next step once it is interrupted.

    TensorRT calls it from any of its threads.
    """

    def __init__(self, graph: str, interrupted: Callable[[], bool], show: bool = True) -> None:
        super().__init__()
        self.graph, self.interrupted, self.show = graph, interrupted, show
        self.outermost: str | None = None
        self.bar = progress_bar(0, "step", show)
        self.lock = threading.Lock()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self.lock:
            if parent_phase is None:
                self.outermost = phase_name
                self.bar.close()
                self.bar = progress_bar(num_steps, "step", self.show, description=f"{self.graph}: {phase_name}")

    def step_complete(self, phase_name: str, step: int) -> bool:
        with self.lock:
            if phase_name == self.outermost:
                self.bar.update(step + 1 - self.bar.n)
        return not self.interrupted()

    def phase_finish(self, phase_name: str) -> None:
        with self.lock:
            if phase_name == self.outermost:
                self.outermost = None
                self.bar.close()
