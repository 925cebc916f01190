"""`enat-export`: an engine from a checkpoint, or from a float32 engine one in another precision."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..calibration.statistics import METHODS
from ..errors import InputError
from ..models.presets import PRESETS
from ..runtime.command import Command, needs
from .directory import check_target

if TYPE_CHECKING:
    from .convert import Precision

CHECKPOINT_OPTIONS = {
    "vqgan": "--vqgan",
    "preset_name": "--preset",
    "heads": "--heads",
    "encoder_depth": "--encoder-depth",
    "class_names": "--class-names",
    "steps": "--steps",
    "cfg_scale": "--guidance",
    "mask_temp": "--mask-temperature",
    "samp_temp": "--sampling-temperature",
    "image_encoder": "--no-image-encoder",
}
CALIBRATION_OPTIONS = {
    "method": "--calibration-method",
    "smoothquant": "--smoothquant",
    "weight_bits": "--weight-bits",
    "images": "--calibration-images",
    "classes": "--calibration-classes",
    "seed": "--calibration-seed",
    "modulation": "--modulation",
    "float_layers": "--float-layers",
}


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--ckpt", type=click.Path(path_type=Path), help="The network: .pth, .ckpt or .safetensors.")
@click.option("--vqgan", type=click.Path(path_type=Path), help="The image tokenizer; without it the engine gives tokens only.")
@click.option("--engine", type=click.Path(path_type=Path), help="In place of --ckpt: a float32 engine, to be made in another precision.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The engine directory to write.")
@click.option(
    "--preset", "preset_name", type=click.Choice(list(PRESETS)), help="Split, sampling defaults and class names of a published model."
)
@click.option("--heads", type=int, help="Attention heads; default: the preset's, or head_dim 64.")
@click.option("--encoder-depth", type=int, help="Blocks that encode; default: the preset's, or all but the last 2.")
@click.option("--steps", type=int, help="Default number of sampling steps of the engine.")
@click.option("--guidance", "cfg_scale", type=float, help="Default guidance of the engine.")
@click.option("--mask-temperature", "mask_temp", type=float, help="Default mask temperature of the engine.")
@click.option("--sampling-temperature", "samp_temp", type=float, help="Default sampling temperature of the engine.")
@click.option(
    "--class-names",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text file with one class name a line; default: the preset's.",
)
@click.option("--image-encoder/--no-image-encoder", default=None, help="Export the tokenizer's encoder too; default: yes.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8"]), default="fp32", show_default=True)
@click.option(
    "--float-type", type=click.Choice(["fp32", "fp16"]), help="Of what an int8 engine does not quantize: fp32 (default) for CPUs."
)
@click.option("--calibration-method", "method", type=click.Choice(list(METHODS)), help="Default: percentile.")
@click.option("--smoothquant", type=float, metavar="ALPHA", help="SmoothQuant's exponent, 0 for none; default: 0.7.")
@click.option("--weight-bits", type=click.Choice(["8", "7"]), help="7 for CPUs whose int8 kernels saturate (without VNNI); default: 8.")
@click.option("--calibration-images", "images", type=int, help="Pictures that the engine draws to be watched; default: 64.")
@click.option("--calibration-classes", "classes", metavar="CLASSES", help="Of these pictures, with commas: 207,10-19; default: all.")
@click.option("--calibration-seed", "seed", type=int, help="Of these pictures; default: 0.")
@click.option("--modulation", type=click.Choice(["int8", "float"]), help="The modulation table; default: int8.")
@click.option("--float-layers", metavar="LAYERS", help="Layers to leave in float, with commas, or none; default: by measured sensitivity.")
@click.option(
    "--calibration",
    "calibration_file",
    type=click.Path(path_type=Path),
    help="File of the calibration: read where it exists, else written.",
)
@click.option("--force", is_flag=True, help="Replace an engine that exists.")
def main(
    ckpt: Path | None,
    engine: Path | None,
    out: Path,
    precision: str,
    float_type: str | None,
    calibration_file: Path | None,
    force: bool,
    **options: Any,
) -> None:
    """Export a checkpoint as an engine: graphs traced, verified, and put in place only when all is well.

    fp16 and int8 engines are made from the float32 one, which learns on pictures of its own, and compared with it.
    """
    started = time.perf_counter()

    def report(line: str) -> None:
        click.echo(f"[{time.perf_counter() - started:6.1f} s] {line}", err=True)

    if (ckpt is None) == (engine is None):
        raise InputError("expected either --ckpt or --engine")
    checkpoint = {name: options[name] for name in CHECKPOINT_OPTIONS if options[name] is not None}
    calibration = {name: options[name] for name in CALIBRATION_OPTIONS if options[name] is not None}
    if engine and checkpoint:
        raise InputError(f"{CHECKPOINT_OPTIONS[next(iter(checkpoint))]} goes with --ckpt; an engine brings its own")
    if engine and precision == "fp32":
        raise InputError("--engine is made in another precision: expected --precision fp16 or int8")
    if precision != "int8" and (calibration or calibration_file):
        given = CALIBRATION_OPTIONS[next(iter(calibration))] if calibration else "--calibration"
        raise InputError(f"{given} goes with --precision int8")
    if precision != "int8" and float_type:
        raise InputError("--float-type goes with --precision int8")
    check_target(out, force)
    if precision == "fp32":
        assert ckpt is not None
        export_checkpoint(ckpt, out, force, report, **checkpoint)
        report(f"engine written to {out}")
        return
    chosen, settings = conversion(precision, float_type, calibration)
    from .convert import convert_engine

    if engine:
        convert_engine(engine, out, chosen, settings, calibration_file, force, report, progress=True)
        return
    assert ckpt is not None
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".float32", dir=out.absolute().parent) as folder:
        export_checkpoint(ckpt, Path(folder), force, report, **checkpoint)
        convert_engine(Path(folder), out, chosen, settings, calibration_file, force, report, progress=True)


def export_checkpoint(ckpt: Path, out: Path, force: bool, report: Any, class_names: Path | None = None, **options: Any) -> None:
    with needs("export,cpu", "exporting a checkpoint"):
        from .engine import export_engine
    names = class_names.read_text("utf-8").splitlines() if class_names else None
    sampling: dict[str, Any] = {name: options.pop(name) for name in ("steps", "cfg_scale", "mask_temp", "samp_temp") if name in options}
    export_engine(ckpt, out, sampling=sampling, class_names=names, force=force, report=report, **options)


def conversion(precision: str, float_type: str | None, options: dict[str, Any]) -> tuple[Precision, Any]:
    """The precision and the calibration's settings of a command line."""
    with needs("calibration", f"--precision {precision}"):
        from ..calibration.calibrate import Settings
        from .convert import Precision
    if "weight_bits" in options:
        options["weight_bits"] = int(options["weight_bits"])
    for name in ("classes", "float_layers"):
        if name in options:
            words = [word.strip() for word in options[name].split(",") if word.strip()]
            if not words:
                raise InputError(f"{CALIBRATION_OPTIONS[name]}: expected words with commas between, got {options[name]!r}")
            options[name] = () if name == "float_layers" and words == ["none"] else tuple(words)
    return Precision(precision, float_type or "fp32"), Settings(**options)
