"""Whether engines in other precisions draw as well as the float32 one: thousands of pictures of each, with confidence intervals.

python -m enat.demo.precisions --engine work/fp16 --engine work/int8
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..runtime.command import Command, backend_option
from ..runtime.pipeline import Pipeline
from .classifier import Classifier, load_classifier, measure
from .evaluate import check_demo, frechet
from .fonts import CLASSES

OTHER_SEEDS = 10_000_000  # how far the second float32 run's seeds are from the first's
RESAMPLES = 200


@dataclass(frozen=True)
class Drawn:
    """Pictures as the classifier sees them: features [N, 64], and whether each was recognised [N]."""

    name: str
    features: NDArray[np.float32]
    recognised: NDArray[np.bool_]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval, by bootstrap over the pictures."""

    value: float
    low: float
    high: float

    def shown(self, scale: float = 1, digits: int = 2) -> str:
        return f"{self.value * scale:.{digits}f} ({self.low * scale:.{digits}f} to {self.high * scale:.{digits}f})"


@dataclass(frozen=True)
class Figures:
    """Of one run: accuracy and Fréchet distance, and how they differ from the float32 run's (the distance as a ratio). The distance
    alone has no interval: fewer different pictures lie further from the real ones, so that all resamples are above it."""

    name: str
    accuracy: Estimate
    distance: float
    accuracy_difference: Estimate
    distance_ratio: Estimate

    def shown(self) -> str:
        return (
            f"{self.name}\n"
            f"  recognised        {self.accuracy.shown(100)} %   against float32 {self.accuracy_difference.shown(100)} points\n"
            f"  Fréchet distance  {self.distance:.2f}     against float32 × {self.distance_ratio.shown(digits=3)}"
        )


def draw(name: str, pipeline: Pipeline, classifier: Classifier, num: int, seed: int) -> Drawn:
    """`num` pictures a class, class by class; class k's first has seed + k · num."""
    check_demo(pipeline)
    parts = []
    for label in tqdm(range(len(CLASSES)), desc=name, unit="class", disable=None, leave=False):
        pictures = pipeline.generate([label], num=num, seed=seed + label * num, batch_size=32)
        features, seen = measure(classifier, pictures)
        parts.append((features, seen == label))
    return Drawn(name, np.concatenate([features for features, _ in parts]), np.concatenate([right for _, right in parts]))


def compare(reference: Drawn, others: Sequence[Drawn], real: tuple[NDArray[Any], NDArray[Any]]) -> list[Figures]:
    """Figures of the reference and of all others. real: mean and covariance of the real pictures' features.

    A resample takes the same pictures of every run, since runs at the same seeds draw nearly the same ones.
    """
    runs = [reference, *others]
    rng = np.random.default_rng(0)
    count = len(reference.recognised)
    resamples = [np.arange(count), *(rng.integers(count, size=count) for _ in range(RESAMPLES))]
    accuracies = np.array([[run.recognised[chosen].mean() for run in runs] for chosen in resamples])
    distances = np.array([[distance(run.features[chosen], real) for run in runs] for chosen in resamples])

    def estimate(samples: NDArray[Any]) -> Estimate:
        low, high = np.percentile(samples[1:], (2.5, 97.5))
        return Estimate(float(samples[0]), float(low), float(high))

    return [
        Figures(
            run.name,
            estimate(accuracies[:, i]),
            float(distances[0, i]),
            estimate(accuracies[:, i] - accuracies[:, 0]),
            estimate(distances[:, i] / distances[:, 0]),
        )
        for i, run in enumerate(runs)
    ]


def distance(features: NDArray[np.float32], real: tuple[NDArray[Any], NDArray[Any]]) -> float:
    return frechet(features.mean(0), np.cov(features, rowvar=False), *real)


def evaluate_precisions(
    engines: Sequence[Path], references: Path, num: int, seed: int, original: Path | None = None, backend: str = "auto"
) -> list[Figures]:
    """Float32, float32 at other seeds, and every engine at the first seeds, run by the backend: `num` pictures a class of each."""
    classifier = load_classifier(references / "classifier.pth")
    with np.load(references / "features.npz") as data:
        real = data["mean"], data["covariance"]
    with Pipeline.load(original) as pipeline:
        first = draw("float32", pipeline, classifier, num, seed)
        others = [draw("float32, other seeds", pipeline, classifier, num, seed + OTHER_SEEDS)]
    for engine in engines:
        with Pipeline.load(engine, backend=backend) as pipeline:
            others.append(draw(str(engine), pipeline, classifier, num, seed))
    return compare(first, others, real)


@click.command(cls=Command)
@click.option("--engine", "engines", type=click.Path(exists=True, path_type=Path), multiple=True, required=True, help="May be repeated.")
@click.option("--original", type=click.Path(exists=True, path_type=Path), help="The float32 engine; default: the bundled one.")
@backend_option(help="That runs the engines.")
@click.option("--references", type=click.Path(exists=True, path_type=Path), default=Path("demo/evaluation"), show_default=True)
@click.option("--num", type=click.IntRange(1), default=560, show_default=True, help="Pictures a class.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(engines: tuple[Path, ...], original: Path | None, backend: str, references: Path, num: int, seed: int, as_json: bool) -> None:
    """Compare the demo's pictures between precisions."""
    figures = evaluate_precisions(engines, references, num, seed, original, backend)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in figures]))
        return
    click.echo(f"{num * len(CLASSES)} pictures of each; 95 % intervals in brackets")
    for one in figures:
        click.echo(one.shown())


if __name__ == "__main__":
    main()
