"""How good the demo's pictures are: recognised, varied, and not remembered. Needs PyTorch for the classifier, and no font.

python -m enat.demo.evaluate --num 100
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..errors import InputError
from ..runtime.command import Command
from ..runtime.pipeline import Pipeline
from .classifier import load_classifier, measure
from .fonts import CLASSES
from .letters import IMAGE_SIZE
from .references import spread

SAME = {CLASSES.index("0"): CLASSES.index("O"), CLASSES.index("1"): CLASSES.index("I")}  # in many fonts


def check_demo(pipeline: Pipeline) -> None:
    """Raises InputError for an engine that draws something else than letters and digits."""
    model = pipeline.manifest.model
    if (model.num_classes, model.image_size) != (len(CLASSES), IMAGE_SIZE):
        raise InputError(
            f"{pipeline.manifest.folder}: {model.num_classes} classes and pictures of {model.image_size} pixels; "
            f"expected an engine of the demo: {len(CLASSES)} classes, {IMAGE_SIZE} pixels"
        )


def merged(labels: np.ndarray) -> np.ndarray:
    """Labels with 0 counted as O and 1 as I."""
    result = labels.copy()
    for one, other in SAME.items():
        result[labels == one] = other
    return result


def accuracy(seen: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share recognised, also with O/0 and I/1 merged, and half the width of its 95 % interval."""
    share = float((seen == labels).mean())
    return {
        "accuracy": share,
        "interval": 1.96 * (share * (1 - share) / len(labels)) ** 0.5,
        "merged": float((merged(seen) == merged(labels)).mean()),
    }


def nearest(features: np.ndarray, labels: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Distance of every picture [N, F] to the nearest training picture of its class; training [36, M, F]."""
    result = np.empty(len(features))
    for label in range(len(training)):
        mine = features[labels == label]
        squared = (mine**2).sum(1)[:, None] - 2 * mine @ training[label].T + (training[label] ** 2).sum(1)
        result[labels == label] = np.sqrt(np.maximum(squared.min(1), 0))
    return result


def frechet(mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray) -> float:
    """Fréchet distance of two Gaussians (Heusel et al., 2017)."""
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other_covariance @ root), 0)).sum()
    return float(((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * cross)


def evaluate(pipeline: Pipeline, references: Path, num: int, seed: int, progress: bool = False, **settings: Any) -> dict[str, Any]:
    """Measures `num` pictures a class, and the real pictures beside them. references: the folder that enat.demo.references wrote."""
    check_demo(pipeline)
    classifier = load_classifier(references / "classifier.pth")
    with np.load(references / "held_out.npz") as data:
        real, real_labels = data["pictures"], data["labels"].astype(np.int64)
    with np.load(references / "features.npz") as data:
        reference = {name: data[name] for name in data.files}
    training = reference["training"].astype(np.float32) * reference["scale"]
    labels = np.repeat(np.arange(len(CLASSES)), num)
    pictures = pipeline.generate(range(len(CLASSES)), num=num, seed=seed, batch_size=36, progress=progress, **settings)
    features, seen = measure(classifier, pictures)
    real_features, real_seen = measure(classifier, real)
    spreads = np.array([spread(features[labels == label]) for label in range(len(CLASSES))]) / reference["spread"]
    return {
        "pictures": len(pictures),
        "generated": accuracy(seen, labels),
        "real": accuracy(real_seen, real_labels),
        "spread": {"mean": float(spreads.mean()), "least": float(spreads.min()), "least_class": CLASSES[int(spreads.argmin())]},
        "nearest_training_picture": {
            "generated": float(np.median(nearest(features, labels, training))),
            "real": float(np.median(nearest(real_features, real_labels, training))),
        },
        "frechet_distance": frechet(features.mean(0), np.cov(features, rowvar=False), reference["mean"], reference["covariance"]),
    }


@click.command(cls=Command)
@click.option("--engine", type=click.Path(path_type=Path), help="Engine directory; default: the bundled one.")
@click.option("--references", type=click.Path(exists=True, path_type=Path), default=Path("demo/evaluation"), show_default=True)
@click.option("--num", type=click.IntRange(1), default=100, show_default=True, help="Pictures a class.")
@click.option("--seed", default=0, show_default=True)
@click.option("--steps", type=int)
@click.option("--guidance", type=float)
@click.option("--mask-temperature", type=float)
@click.option("--sampling-temperature", type=float)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(engine: Path | None, references: Path, num: int, seed: int, as_json: bool, **settings: Any) -> None:
    """Measure the demo engine's pictures."""
    figures = evaluate(Pipeline.load(engine), references, num, seed, progress=True, **settings)
    if as_json:
        click.echo(json.dumps(figures))
        return
    generated, real, distance = figures["generated"], figures["real"], figures["nearest_training_picture"]
    click.echo(f"{figures['pictures']} pictures drawn, {num} a class; real ones in fonts that nothing was trained on")
    share = {name: f"{one['accuracy']:.1%} ± {one['interval']:.1%}" for name, one in (("generated", generated), ("real", real))}
    click.echo(f"recognised                 {share['generated']}   real {share['real']}")
    click.echo(f"  with O/0 and I/1 merged  {generated['merged']:.1%}   real {real['merged']:.1%}")
    least = figures["spread"]
    click.echo(f"spread within a class      {least['mean']:.2f} of the real ones' (least: {least['least']:.2f}, {least['least_class']})")
    click.echo(f"to the nearest training picture  {distance['generated']:.2f}   real {distance['real']:.2f} (medians)")
    click.echo(f"Fréchet distance to real pictures {figures['frechet_distance']:.2f}")


if __name__ == "__main__":
    main()
