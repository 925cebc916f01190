"""What the demo is measured against, kept so that no font is needed: real pictures, and their features.

    python -m enat.demo.references --fonts work/fonts --classifier work/classifier/classifier.pth --out demo/evaluation

writes `held_out.npz` (real pictures in fonts that nothing was trained on, and their classes) and `features.npz` (the classifier's
features of every picture that the network was trained on, as bytes with a scale, and the mean and covariance of those of more real
pictures in fonts that nothing was trained on).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import numpy as np

from .classifier import load_classifier, measure
from .fonts import CLASSES
from .letters import Glyphs, draw_pictures

HELD_OUT = 12  # pictures a class that are kept
MEASURED = 500  # pictures a class whose statistics are kept


@click.command()
@click.option("--fonts", type=click.Path(exists=True, path_type=Path), required=True, help="Folder made by enat.demo.fonts.")
@click.option("--classifier", "checkpoint", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--pictures", default=1500, show_default=True, help="Training pictures a class, as the network was trained on.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(fonts: Path, checkpoint: Path, pictures: int, out: Path) -> None:
    """Write the reference pictures and features."""
    out.mkdir(parents=True, exist_ok=True)
    classifier = load_classifier(checkpoint)
    held_out = Glyphs(fonts, "held-out")
    kept, labels = draw_pictures(held_out, HELD_OUT, seed=3)
    np.savez_compressed(out / "held_out.npz", pictures=kept, labels=labels.astype(np.uint8))
    real, real_labels = draw_pictures(held_out, MEASURED, seed=4)
    features, seen = measure(classifier, real)
    training, _ = measure(classifier, draw_pictures(Glyphs(fonts, "train"), pictures, seed=1)[0])
    scale = np.abs(training).max() / 127
    np.savez_compressed(
        out / "features.npz",
        training=np.round(training / scale).astype(np.int8).reshape(len(CLASSES), pictures, -1),
        scale=np.float32(scale),
        mean=features.mean(0),
        covariance=np.cov(features, rowvar=False),
        spread=np.array([spread(features[real_labels == label]) for label in range(len(CLASSES))]),
        accuracy=np.float64((seen == real_labels).mean()),
    )
    shutil.copy(checkpoint, out / "classifier.pth")
    click.echo(f"accuracy on {len(real)} pictures in fonts never seen: {(seen == real_labels).mean():.4f}")


def spread(features: np.ndarray) -> float:
    """Root of the mean squared distance to the mean: how much pictures of one class [N, F] differ."""
    return float(np.sqrt(((features - features.mean(0)) ** 2).sum(1).mean()))


if __name__ == "__main__":
    main()
