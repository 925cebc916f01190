"""What is measured of anything that draws pictures: how long a batch takes, step by step and graph by graph."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..runtime.backends import Array, Backend, Lane, Program, Tensor
from ..runtime.pipeline import Pipeline

SEED = 0


@dataclass(frozen=True)
class Case:
    """One batch to draw. pictures: tokens are decoded too."""

    batch: int
    steps: int
    pictures: bool

    def labels(self, classes: int) -> list[int]:
        """Different ones, as far as there are."""
        return [i % classes for i in range(self.batch)]


class Contender(Protocol):
    """Something that draws batches."""

    name: str

    def draw(self, case: Case) -> object:
        """Draws one batch and waits for it."""


class Engine:
    """An engine on a backend."""

    def __init__(self, name: str, pipeline: Pipeline) -> None:
        self.name, self.pipeline = name, pipeline

    def draw(self, case: Case) -> object:
        pipe = self.pipeline
        draw = pipe.generate if case.pictures else pipe.generate_tokens
        return draw(case.labels(pipe.manifest.model.num_classes), seed=SEED, steps=case.steps, batch_size=case.batch)

    def watch(self, case: Case) -> list[Launch]:
        """Draws one batch, each of its graphs waited for."""
        watched = WatchedBackend(self.pipeline.backend)
        Engine(self.name, Pipeline(self.pipeline.manifest, watched)).draw(case)
        return watched.launches


@dataclass(frozen=True)
class Launch:
    """One run of a graph. step: the first is 0; condition and image decoder belong to none."""

    graph: str
    step: int | None
    seconds: float


class WatchedBackend:
    """A backend whose lanes note how long each graph took."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.name, self.device = backend, backend.name, backend.device
        self.launches: list[Launch] = []

    @contextlib.contextmanager
    def lease(self) -> Iterator[WatchedLane]:
        with self.backend.lease() as lane:
            yield WatchedLane(lane, self.launches)

    def close(self) -> None:
        """The backend stays open: others use it."""


class WatchedLane:
    """A lane that waits for each graph before the next."""

    records = False
    dry = False

    def __init__(self, lane: Lane, launches: list[Launch]) -> None:
        self.lane, self.launches = lane, launches
        self.step = 0

    def upload(self, array: Array) -> Tensor:
        return self.lane.upload(array)

    def download(self, tensor: Tensor) -> Array:
        return self.lane.download(tensor)

    def run(self, graph: str, inputs: Mapping[str, Tensor | Array]) -> Sequence[Tensor]:
        start = time.perf_counter()
        outputs = self.lane.run(graph, inputs)
        self.lane.download(self.lane.first_rows(outputs[-1], 1))  # waits for the graph; on a device it brings one row over
        seconds = time.perf_counter() - start
        self.launches.append(Launch(graph, None if graph in ("condition", "image_decoder") else self.step, seconds))
        self.step += graph == "sampler"
        return outputs

    def first_rows(self, tensor: Tensor, rows: int) -> Tensor:
        return self.lane.first_rows(tensor, rows)

    def concatenate(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.lane.concatenate(tensors)

    def compute(self, key: Hashable | None, arrays: Mapping[str, Array], program: Program) -> list[Array]:
        self.step = 0
        return self.lane.compute(None, arrays, program)


@dataclass
class Measurement:
    """One contender drawing one case. seconds: a batch, one number a round; graphs, steps: medians in seconds, of engines alone."""

    name: str
    case: Case
    seconds: list[float] = field(default_factory=list)
    graphs: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return self.case.batch / self.median

    def times_faster(self, other: Measurement) -> float:
        """Than another: the median over the rounds, in each of which both ran."""
        return statistics.median(theirs / mine for theirs, mine in zip(other.seconds, self.seconds, strict=True))

    def summary(self) -> dict[str, Any]:
        """As plain numbers."""
        return {
            "name": self.name,
            **vars(self.case),
            "seconds": self.seconds,
            "median": self.median,
            "pictures_per_second": self.rate,
            "graphs": self.graphs,
            "by_step": self.steps,
        }


def measure(
    contenders: Sequence[Contender], cases: Sequence[Case], warmup: int, repeats: int, advance: Callable[[], object] = lambda: None
) -> list[list[Measurement]]:
    """Every contender's times for each case, round after round, in each of which every contender draws every case once. advance: called
    after every batch."""
    result = [[Measurement(one.name, case) for one in contenders] for case in cases]
    pairs = [(one, measurement) for row in result for one, measurement in zip(contenders, row, strict=True)]
    for one, measurement in pairs:
        for _ in range(warmup):
            one.draw(measurement.case)
            advance()
    for _ in range(repeats):
        for one, measurement in pairs:
            start = time.perf_counter()
            one.draw(measurement.case)
            measurement.seconds.append(time.perf_counter() - start)
            advance()
    for one, measurement in pairs:
        if isinstance(one, Engine):
            measurement.graphs, measurement.steps = break_down([one.watch(measurement.case) for _ in range(repeats)])
            advance()
    return result


def break_down(runs: Sequence[Sequence[Launch]]) -> tuple[dict[str, float], list[float]]:
    """Median seconds over runs of the same launches: graph by graph, and step by step."""
    seconds = np.median([[launch.seconds for launch in run] for run in runs], axis=0)
    graphs: dict[str, float] = {}
    steps: dict[int, float] = {}
    for launch, one in zip(runs[0], seconds.tolist(), strict=True):
        graphs[launch.graph] = graphs.get(launch.graph, 0) + one
        if launch.step is not None:
            steps[launch.step] = steps.get(launch.step, 0) + one
    return graphs, [steps[step] for step in sorted(steps)]
