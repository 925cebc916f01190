"""TensorRT's build progress as a bar."""

from __future__ import annotations

import tensorrt as trt

from ..runtime.progress import progress_bar


class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc]
    """A bar of the outermost phase that TensorRT is in. Ctrl-C ends the build at its next step; `interrupted` tells of it."""

    def __init__(self, graph: str) -> None:
        super().__init__()
        self.graph = graph
        self.outermost: str | None = None
        self.bar = progress_bar(0, "step")
        self.interrupted = False

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        if parent_phase is None:
            self.outermost = phase_name
            self.bar.close()
            self.bar = progress_bar(num_steps, "step", description=f"{self.graph}: {phase_name}")

    def step_complete(self, phase_name: str, step: int) -> bool:
        try:
            if phase_name == self.outermost:
                self.bar.update(step + 1 - self.bar.n)
        except KeyboardInterrupt:
            self.interrupted = True
        return not self.interrupted

    def phase_finish(self, phase_name: str) -> None:
        if phase_name == self.outermost:
            self.outermost = None
            self.bar.close()
