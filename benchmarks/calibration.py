"""What each way of calibrating gives: an int8 engine by each, compared with float32 on the same pictures.

python -m enat.benchmarks.calibration                    # the bundled engine; a Markdown table
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from ..calibration.calibrate import Settings
from ..calibration.products import find_products, load_graphs
from ..calibration.statistics import METHODS
from ..errors import InputError
from ..export.compare import compare
from ..export.convert import Precision, convert_engine
from ..runtime.command import Command
from ..runtime.manifest import read_manifest
from ..runtime.pipeline import BUNDLED_ENGINE, Pipeline

SEED = 10_000


def variants(engine: Path, alphas: Sequence[float]) -> dict[str, Settings]:
    """Every method with every smoothing, nothing left in float; then the defaults, and each of their parts changed."""
    every = {
        f"{method}, SmoothQuant {alpha:g}" if alpha else method: Settings(method, alpha, float_layers=(), modulation="float")
        for method, alpha in itertools.product(METHODS, (0.0, *alphas))
    }
    network = [product.name for product in find_products(load_graphs(read_manifest(engine))) if product.graph != "image_decoder"]
    return {
        **every,
        "defaults": Settings(),
        "defaults, all layers in 8 bits": Settings(float_layers=()),
        "defaults, the network's layers in float": Settings(float_layers=tuple(network)),
        "defaults, modulation in float": Settings(modulation="float"),
        "defaults, weights of 7 bits": Settings(weight_bits=7),
        "defaults, 16 images": Settings(images=16),
        "defaults, 256 images": Settings(images=256),
    }


@click.command(cls=Command)
@click.option(
    "--engine", type=click.Path(exists=True, path_type=Path), default=BUNDLED_ENGINE, help="A float32 engine; default: the bundled one."
)
@click.option("--alpha", "alphas", type=float, multiple=True, default=(0.3, 0.5, 0.7, 0.85), show_default=True)
@click.option("--images", default=512, show_default=True, help="Pictures to compare on.")
def main(engine: Path, alphas: tuple[float, ...], images: int) -> None:
    """Print divergence, top-1 agreement, PSNR and size of every variant."""
    if images < 1:
        raise InputError(f"expected 1 or more images, got {images}")
    click.echo("| calibration | divergence, nats | top-1 | PSNR, dB | int8 share | size |")
    click.echo("|---|---|---|---|---|---|")
    with Pipeline.load(engine) as reference, tempfile.TemporaryDirectory() as folder:
        for name, settings in variants(engine, alphas).items():
            out = Path(folder) / "engine"
            convert_engine(engine, out, Precision("int8"), settings, force=True)
            with Pipeline.load(out) as pipeline:
                found = compare(pipeline, reference, images, SEED, progress=True)
            psnr = "-" if found.psnr is None else f"{found.psnr:.1f}"
            size = f"{found.bytes / 1e6:.1f} MB"
            click.echo(f"| {name} | {found.divergence:.5f} | {found.top1:.2%} | {psnr} | {found.share['all']:.1%} | {size} |")


if __name__ == "__main__":
    main()
