"""`enat-verify`: how far an engine is from its float32 original."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from PIL import Image

from ..errors import ExportError, InputError
from ..runtime.backends import open_backend
from ..runtime.classes import parse_classes
from ..runtime.command import Command, Source, Target, backend_option, needs
from ..runtime.files import WholeFile, check_writable
from ..runtime.manifest import read_manifest
from ..runtime.pictures import IMAGE_SUFFIXES, Images, check_fits, save_image, sheet, sheet_size
from ..runtime.pipeline import Pipeline, check_batch_size

if TYPE_CHECKING:
    from .compare import Comparison

COLUMNS = 12  # pictures side by side in the sheet


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("engine", type=Source())
@click.option("--against", type=Source(), required=True, help="The float32 engine that it was made from.")
@click.option("--images", default=64, show_default=True, help="Pictures to draw with each.")
@click.option("--seed", default=0, show_default=True, help="Picture i has seed SEED + i.")
@click.option("--class", "classes", multiple=True, metavar="CLASS", help="Of these classes, as in enat-run; default: spread over all.")
@click.option("--batch-size", default=8, show_default=True)
@backend_option(help="That runs ENGINE.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, help="CPU threads of each; default: one for each core that the process may use.")
@click.option("--sheet", "sheet_file", type=Target(), help="Picture to write: above float32, below ENGINE.")
@click.option("--plot", type=Target(), help="Plot to write: error by step and by layer (needs matplotlib).")
@click.option("--max-divergence", type=float, help="Fail (exit code 1) where the mean divergence is larger, in nats.")
@click.option("--min-top1", type=float, help="Fail where the share of equal most likely tokens is smaller, 0 to 1.")
@click.option("--min-psnr", type=float, help="Fail where the pictures' PSNR is smaller, in dB.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON on stdout.")
def main(
    engine: Path,
    against: Path,
    images: int,
    seed: int,
    classes: tuple[str, ...],
    batch_size: int,
    backend: str,
    device: str,
    threads: int | None,
    sheet_file: Path | None,
    plot: Path | None,
    max_divergence: float | None,
    min_top1: float | None,
    min_psnr: float | None,
    as_json: bool,
) -> None:
    """Compare an engine with the float32 engine that it was made from.

    Along the trajectories that float32 draws, so that both see the same tokens; and left to itself, at the same seeds.
    """
    check_batch_size(batch_size)
    for option, limit in (("--max-divergence", max_divergence), ("--min-psnr", min_psnr)):
        if limit is not None and not 0 <= limit < inf:
            raise InputError(f"{option}: expected a number of 0 or more, got {limit}")
    if min_top1 is not None and not 0 <= min_top1 <= 1:
        share = f" (did you mean {min_top1 / 100:g}?)" if 1 < min_top1 <= 100 else ""
        raise InputError(f"--min-top1: expected a number of 0 to 1, got {min_top1}{share}")
    for file, suffixes in ((sheet_file, IMAGE_SUFFIXES), (plot, (".png", ".svg", ".pdf"))):
        if file and file.suffix.lower() not in suffixes:
            raise InputError(f"{file}: expected a file that ends in {', '.join(suffixes)}")
        if file:
            check_writable(file, file=True)
    with needs("calibration,cpu", "comparing engines"):
        from .compare import check_same_model, compare, seeds_of
        from .layers import layer_errors
    if plot:
        with needs("plot", "--plot"):
            import matplotlib
        matplotlib.use("Agg")
    seeds_of(images, seed)
    one, other = read_manifest(engine), read_manifest(against)
    check_same_model(one, other)
    labels = parse_classes(other.model, classes) if classes else None
    if sheet_file or min_psnr is not None:
        one.require_images()
        other.require_images()
    if sheet_file:
        size = other.model.image_size or 0
        columns = sheet_columns(images)
        rows = 2 * max(1, -(-images // columns))
        check_fits(sheet_file, sheet_size(rows * columns, size, size, columns), {})
    with (
        Pipeline(one, open_backend(backend, one, device, threads)) as mine,
        Pipeline(other, open_backend("auto", other, threads=threads)) as reference,
    ):
        title = f"{engine} ({mine.backend.name}) against {against} ({reference.backend.name})"
        result = compare(mine, reference, images, seed, labels, batch_size, keep_pictures=sheet_file is not None, progress=True)
        layers: dict[str, float] = {}
        if plot:
            layers = layer_errors(mine, reference, seed, labels, next(folder for folder in plot.absolute().parents if folder.exists()))
    missed = misses(result, max_divergence, min_top1, min_psnr)
    if as_json:
        what = {"engine": str(engine), "backend": mine.backend.name, "against": str(against)}
        click.echo(json.dumps({**what, **result.summary(), "layers": layers, "missed": missed}))
    else:
        click.echo(report(result, title))
    if plot:
        draw_plot(result, layers, plot, title)
    if sheet_file:
        assert result.pictures is not None
        save_image(side_by_side(*result.pictures), sheet_file, {"engine": str(engine), "against": str(against), "seed": seed})
    if missed:
        raise ExportError("; ".join(missed))


def report(result: Comparison, title: str) -> str:
    """The comparison as text to read."""
    share = result.share
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in share.items() if name != "all")
    lines = [
        f"{title}: {result.images} images from seed {result.seed}",
        "",
        "along float32's trajectories",
        "  step  positions  divergence (nats)  top-1 agreement  error of features",
    ]
    for i, (n, d, t, f) in enumerate(zip(result.positions, result.step_divergence, result.step_top1, result.step_features, strict=True)):
        lines.append(f"  {i:4}  {n:9}  {d:17.2e}  {t:15.2%}  {f'{f:17.2e}' if i else '-':>17}")
    lines += [f"  all   {result.positions.sum():9}  {result.divergence:17.2e}  {result.top1:15.2%}", ""]
    if result.psnr is not None:
        lines.append(f"image decoder, same tokens   {result.psnr:.1f} dB PSNR, worst picture {result.least_psnr:.1f} dB")
    lines += [
        f"free runs, same seeds        {result.tokens_equal:.1%} of the tokens are equal",
        f"multiply-adds in 8 bits      {share['all']:.1%} of those with constant weights ({parts})",
        f"size without image encoder   {result.bytes / 1e6:.1f} MB, {result.bytes / result.reference_bytes:.0%} of float32's",
    ]
    return "\n".join(lines)


def misses(result: Comparison, max_divergence: float | None, min_top1: float | None, min_psnr: float | None) -> list[str]:
    """What was asked for and not reached, in words."""
    found = []
    if max_divergence is not None and result.divergence > max_divergence:
        found.append(f"divergence {result.divergence:.3g}, expected at most {max_divergence:g}")
    if min_top1 is not None and result.top1 < min_top1:
        found.append(f"top-1 agreement {result.top1:.6g}, expected at least {min_top1:g}")
    if min_psnr is not None and result.psnr is not None and result.psnr < min_psnr:
        found.append(f"PSNR {result.psnr:.1f} dB, expected at least {min_psnr:g}")
    return found


def sheet_columns(images: int) -> int:
    return max(1, min(COLUMNS, images))


def side_by_side(expected: Images, found: Images) -> Image.Image:
    """Rows of float32's pictures, below each the engine's."""
    columns = sheet_columns(len(expected))
    blank = -len(expected) % columns
    rows = []
    for pictures in (expected, found):
        padded = np.concatenate((pictures, np.full((blank, *pictures.shape[1:]), 255, np.uint8)))
        rows.append(padded.reshape(-1, columns, *pictures.shape[1:]))
    return sheet(np.stack(rows, axis=1).reshape(-1, *expected.shape[1:]), columns)


def draw_plot(result: Comparison, layers: dict[str, float], path: Path, title: str) -> None:
    """Divergence, disagreement and feature error by step; below, the relative error of every layer's output."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(max(9.0, len(layers) * 0.14), 8), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    steps = np.arange(len(result.positions))
    axes[0].plot(steps, result.step_divergence, "o-", label="divergence of the guided logits (nats)")
    axes[0].plot(steps, 1 - result.step_top1, "s-", label="share of other most likely tokens")
    axes[0].plot(steps[1:], result.step_features[1:], "^-", label="relative error of the features")
    axes[0].set(xlabel="step", yscale="log" if result.divergence else "linear", xticks=steps)
    axes[0].grid(alpha=0.3)
    axes[0].legend()
    axes[1].bar(range(len(layers)), list(layers.values()))
    axes[1].set(ylabel="relative error of the layer's output", title="by layer, on ONNX Runtime")
    axes[1].set_xticks(range(len(layers)), list(layers), rotation=90, fontsize=6)
    axes[1].grid(alpha=0.3, axis="y")
    with WholeFile(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix[1:].lower())
    plt.close(figure)


if __name__ == "__main__":
    main()
