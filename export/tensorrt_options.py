"""What TensorRT builds are made for."""

from __future__ import annotations

from dataclasses import dataclass

import tensorrt as trt

from ..errors import InputError
from ..runtime.builds import HARDWARE

WEIGHTS = ("included", "refittable", "stripped")
FAULTY_REFIT = "11.3."  # "may produce incorrect numerical output": NVIDIA, TensorRT 11.3.0, Refitting an Engine


@dataclass(frozen=True)
class Options:
    """What a build is made for.

    steps: numbers of sampling steps whose shapes get profiles of their own. max_batch: images at once, at
    most. best_batch: those that the build is tuned for, the smallest first; each has profiles of its own, for what lies above the one
    before. weights: in the plans ("included"), there and exchangeable ("refittable"), or taken from the graphs at load ("stripped").
    hardware: the GPUs that the plans serve: this model, the same compute capability, or all from Ampere on. version_compatible: with
    later TensorRT of the same major version too. tf32: 10 bits of float32's 23 in products. level: 0 (quick to build) to 5 (fast).
    """

    steps: tuple[int, ...]
    max_batch: int = 16
    best_batch: tuple[int, ...] = (1,)
    weights: str = "included"
    hardware: str = "this"
    version_compatible: bool = False
    tf32: bool = False
    level: int = 3

    def __post_init__(self) -> None:
        for name, value, allowed in (("weights", self.weights, WEIGHTS), ("hardware", self.hardware, HARDWARE)):
            if value not in allowed:
                raise InputError(f"unknown {name} {value!r}; expected {', '.join(allowed)}")
        if not 0 <= self.level <= 5:
            raise InputError(f"expected an optimization level of 0 to 5, got {self.level}")
        bests = self.best_batch
        if not bests or list(bests) != sorted(set(bests)) or not 1 <= bests[0] <= bests[-1] <= self.max_batch:
            found = ",".join(map(str, bests))
            raise InputError(f"expected best batches of 1 to the largest, {self.max_batch}, the smallest first, got {found}")
        if self.version_compatible and self.weights != "included":
            raise InputError(
                f"--version-compatible goes with --weights included, not {self.weights}: the runtime in such plans takes no weights"
            )
        if self.weights == "refittable" and trt.__version__.startswith(FAULTY_REFIT):
            raise InputError(
                f"TensorRT {trt.__version__}: refittable plans may compute wrongly (a known issue of that release); "
                "expected --weights stripped or included, or another TensorRT"
            )

    @property
    def batches(self) -> list[tuple[int, int, int]]:
        """Ranges of images at once, (least, best, most): up to each best batch, and the last one up to the largest."""
        firsts, mosts = (1, *(best + 1 for best in self.best_batch[:-1])), (*self.best_batch[:-1], self.max_batch)
        return list(zip(firsts, self.best_batch, mosts))
