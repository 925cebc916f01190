"""What the demo's training runs share: the device, checkpoints to go on from, and a log of the losses."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..runtime.files import WholeFile


def pick_device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 for the matrix products, on CPUs with AVX-512 too (others convolve a hundred times as slowly in it); parameters, losses
    and optimizer stay in float32."""
    quick = device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.autocast(device.type, torch.bfloat16, enabled=quick)


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: a linear rise, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def as_images(pictures: NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """uint8 [N, height, width, 3] → [N, 3, height, width] in [0, 1]; contiguous, since NHWC in disguise is half as fast on a CPU."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).contiguous().float() / 255


class Run:
    """A training run in a folder: `state.pt` to go on from, `log.csv` with a line every `log_every` steps.

    `parts` are the objects with state_dict/load_state_dict that make up the run's state.
    """

    def __init__(self, folder: Path, steps: int, log_every: int = 50, save_seconds: float = 60, **parts: Any) -> None:
        self.folder, self.steps, self.log_every, self.save_seconds, self.parts = folder, steps, log_every, save_seconds, parts
        self.step = 0
        self.saved = self.logged = time.monotonic()
        self.sums: dict[str, float] = {}
        self.summed = 0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.pt").exists():
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            self.step = state.pop("step")
            for name, part in parts.items():
                part.load_state_dict(state[name])
            print(f"going on from step {self.step} of {steps}")
        self.forget_lost_steps()

    def forget_lost_steps(self) -> None:
        """Takes steps out of the log that were run after the last save, and are run again."""
        log = self.folder / "log.csv"
        if log.exists():
            with log.open(newline="") as file:
                head, *rows = csv.reader(file)
            with WholeFile(log) as partial, partial.open("w", newline="") as file:
                csv.writer(file).writerows([head, *(row for row in rows if int(row[0]) <= self.step)])

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()} | {"step": self.step}
        with WholeFile(self.folder / "state.pt") as partial:
            torch.save(state, partial)
        self.saved = time.monotonic()

    def remaining(self) -> Iterator[int]:
        """The steps still to be run. Each draws from PyTorch's generator what it always does, wherever the run was interrupted."""
        while self.step < self.steps:
            torch.manual_seed(self.step)
            yield self.step

    def finish_step(self, **losses: torch.Tensor) -> None:
        """Counts a step and its losses; logs and saves when it is time."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(loss.detach())
        self.step += 1
        self.summed += 1
        if self.step % self.log_every == 0:
            now = time.monotonic()
            row = {name: round(total / self.summed, 5) for name, total in self.sums.items()}
            rate = self.summed / (now - self.logged)
            print(
                f"step {self.step}/{self.steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in row.items()) + f"  {rate:.2f} steps/s", flush=True
            )
            log = self.folder / "log.csv"
            new = not log.exists()
            with log.open("a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(["step", *row])
                writer.writerow([self.step, *row.values()])
            self.sums, self.summed, self.logged = {}, 0, now
        if self.step == self.steps or time.monotonic() - self.saved > self.save_seconds:
            self.save()
