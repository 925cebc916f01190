"""The network's own data: runs of an engine's sampling loop, recorded, and replayed with any engine of the same model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..runtime.backends import Lane, Tensor
from ..runtime.loop import initial_inputs, unroll
from ..runtime.manifest import Manifest, ModelInfo
from ..runtime.pipeline import Pipeline, image_seeds
from ..runtime.schedule import Step

Ints = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Trajectory:
    """A batch drawn: tokens and positions [batch, length] in the order in which they were revealed, over `steps`."""

    labels: Sequence[int]
    steps: Sequence[Step]
    tokens: Ints
    positions: Ints


MOST_IMAGES = 1_000_000


def spread_labels(model: ModelInfo, images: int, classes: Sequence[int] | None = None) -> list[int]:
    """Labels for `images` runs, as many different ones as there can be: of `classes`, or evenly over all of the model's."""
    chosen = list(range(model.num_classes)) if classes is None else list(classes)
    if images > MOST_IMAGES:
        raise InputError(f"expected at most {MOST_IMAGES} images, got {images}")
    if images < len(chosen) and classes is not None:
        raise InputError(f"{images} images are too few for {len(chosen)} classes; expected at least one a class")
    if images >= len(chosen):
        return [chosen[i % len(chosen)] for i in range(images)]
    return [chosen[i * len(chosen) // images] for i in range(images)]


def record(
    pipeline: Pipeline,
    labels: Sequence[int],
    seed: int,
    batch_size: int,
    steps: Sequence[Step] | None = None,
    advance: Callable[[int], object] = lambda n: None,
) -> list[Trajectory]:
    """Draws over `steps`, by default the engine's own: image i has labels[i] and seed + i. `advance` is told of finished images.

    Raises InputError for a seed out of its range.
    """
    steps = pipeline.schedule() if steps is None else steps
    seeds = image_seeds(seed, len(labels))
    result = []
    for start in range(0, len(labels), batch_size):
        chosen = slice(start, start + batch_size)
        ((tokens, positions),) = pipeline.draw(labels[chosen], seeds[chosen], steps, batch_size)
        result.append(Trajectory(labels[chosen], steps, tokens, positions))
        advance(len(labels[chosen]))
    return result


# (step, logits of the masked positions: all in raster order at step 0, then as in trajectory.positions[:, step.visible:]; features of
# the visible tokens), both on the lane
OnLogits = Callable[[Step, Tensor, Tensor], None]


def replay(lane: Lane, manifest: Manifest, trajectory: Trajectory, on_logits: OnLogits = lambda step, logits, features: None) -> None:
    """Runs the network along a trajectory: the tokens are the recorded ones, the features those that this engine computes."""

    def choose(step: Step, logits: Tensor, positions: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        on_logits(step, logits, features)
        first, after = step.visible, step.visible + step.masked - step.keep
        tokens, where = trajectory.tokens, trajectory.positions
        parts = (tokens[:, first:], tokens[:, first:after], where[:, first:after], where[:, after:])
        # The next step's positions follow the trajectory's order, not the loop's: the order of masked positions changes nothing.
        return tuple(lane.upload(np.ascontiguousarray(part)) for part in parts)  # type: ignore[return-value]

    inputs = {name: lane.upload(array) for name, array in initial_inputs(manifest, trajectory.labels, trajectory.steps).items()}
    unroll(lane, inputs, len(trajectory.labels), trajectory.steps, choose)


def replayed_logits(lane: Lane, manifest: Manifest, trajectory: Trajectory) -> list[Floats]:
    """Every step's guided logits along a trajectory, float32 [batch, masked, codes]."""
    result: list[Floats] = []

    def on_logits(step: Step, logits: Tensor, features: Tensor) -> None:
        result.append(guided(lane.download(logits), step, len(trajectory.labels)))

    replay(lane, manifest, trajectory, on_logits)
    return result


def guided(logits: Floats, step: Step, batch: int) -> Floats:
    """What the sampler makes of a step's logits [rows, masked, codes] before it draws."""
    conditional, unconditional = logits[:batch], logits[len(logits) - batch :]
    return conditional + np.float32(step.guidance) * (conditional - unconditional)


def log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(logits: Floats, reference: Floats) -> Floats:
    """Kullback-Leibler divergence of softmax(logits) from softmax(reference) in nats, one value a position: [batch, masked]."""
    expected, found = log_softmax(reference.astype(np.float64)), log_softmax(logits.astype(np.float64))
    return (np.exp(expected) * (expected - found)).sum(-1)
