"""`enat-export`: an engine from a checkpoint, from a float32 engine one in another precision, and TensorRT builds of an engine."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..calibration.statistics import METHODS
from ..errors import InputError
from ..models.presets import PRESETS
from ..runtime.command import Command, Source, Target, needs, parse_numbers
from ..runtime.manifest import ModelInfo, read_manifest
from ..runtime.schedule import check_steps
from .directory import beside, check_target

if TYPE_CHECKING:
    from .convert import Precision

CHECKPOINT_OPTIONS = {
    "vqgan": "--vqgan",
    "preset_name": "--preset",
    "heads": "--heads",
    "encoder_depth": "--encoder-depth",
    "class_names": "--class-names",
    "cfg_scale": "--guidance",
    "mask_temp": "--mask-temperature",
    "samp_temp": "--sampling-temperature",
    "image_encoder": "--image-encoder/--no-image-encoder",
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
TENSORRT_OPTIONS = {
    "max_batch": "--max-batch",
    "best_batch": "--best-batch",
    "weights": "--weights",
    "hardware": "--hardware",
    "version_compatible": "--version-compatible",
    "tf32": "--tf32",
    "level": "--build-level",
    "timing_cache": "--timing-cache",
    "refit": "--refit",
    "device": "--device",
}


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--ckpt", type=Source(), help="The network: .pth, .ckpt or .safetensors.")
@click.option("--vqgan", type=Source(), help="The image tokenizer; without it the engine gives tokens only.")
@click.option("--engine", type=Source(), help="In place of --ckpt: an engine, to be made in another precision or built.")
@click.option("--out", type=Target(), help="The engine directory to write; a TensorRT build goes into its engine.")
@click.option(
    "--preset", "preset_name", type=click.Choice(list(PRESETS)), help="Split, sampling defaults and class names of a published model."
)
@click.option("--heads", type=int, help="Attention heads; default: the preset's, or head_dim 64.")
@click.option("--encoder-depth", type=int, help="Blocks that encode; default: the preset's, or all but the last 2.")
@click.option("--steps", metavar="N[,N…]", help="Default number of sampling steps of the engine; all that TensorRT is built for.")
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
    type=Source(),
    help="File of the calibration: read where it exists, else written.",
)
@click.option("--tensorrt", is_flag=True, help="Build the engine for TensorRT on this machine's GPU.")
@click.option("--max-batch", type=int, help="Of the TensorRT build: most images at once; default: 16.")
@click.option("--best-batch", metavar="N[,N…]", help="Of the build: images at once that it is tuned for; default: 1.")
@click.option(
    "--weights",
    type=click.Choice(["included", "refittable", "stripped"]),
    help="Of the build: in it (default), in it and exchangeable, or taken from the graphs at load.",
)
@click.option(
    "--hardware",
    type=click.Choice(["this", "same", "ampere+"]),
    help="GPUs that the build serves: this model (default), the same compute capability, Ampere and later.",
)
@click.option("--version-compatible", is_flag=True, default=None, help="The build serves later TensorRT of the same major version too.")
@click.option("--tf32", is_flag=True, default=None, help="Let float32 products of the build round their factors to 10 bits.")
@click.option("--build-level", "level", type=int, help="TensorRT's optimization level, 0 to 5; default: 3.")
@click.option("--timing-cache", type=Source(), help="File that makes later builds faster: read and written.")
@click.option("--refit", type=Source(), help="Engine whose refittable build gets the new weights, in place of a build.")
@click.option("--device", help="GPU to build on and for; default: cuda:0.")
@click.option("--force", is_flag=True, help="Replace an engine or a build that exists.")
def main(
    ckpt: Path | None,
    engine: Path | None,
    out: Path | None,
    precision: str,
    float_type: str | None,
    calibration_file: Path | None,
    steps: str | None,
    tensorrt: bool,
    force: bool,
    **options: Any,
) -> None:
    """Export a checkpoint as an engine: graphs traced, verified, and put in place only when all is well.

    fp16 and int8 engines are made from the float32 one, which learns on pictures of its own, and compared with it. A TensorRT build is
    made from an engine of any precision, and lies in its directory.
    """
    started = time.perf_counter()

    def report(line: str) -> None:
        click.echo(f"[{time.perf_counter() - started:6.1f} s] {line}", err=True)

    if (ckpt is None) == (engine is None):
        raise InputError("expected either --ckpt or --engine")
    numbers = parse_numbers("--steps", steps)
    given = {name: value for name, value in options.items() if value is not None}
    checkpoint = {name: given[name] for name in CHECKPOINT_OPTIONS if name in given}
    calibration = {name: given[name] for name in CALIBRATION_OPTIONS if name in given}
    building = {name: given[name] for name in TENSORRT_OPTIONS if name in given}
    if "best_batch" in building:
        building["best_batch"] = parse_numbers("--best-batch", building["best_batch"])
    converting = engine is not None and precision != "fp32"
    if engine and checkpoint:
        raise InputError(f"{CHECKPOINT_OPTIONS[next(iter(checkpoint))]} goes with --ckpt; an engine brings its own")
    if checkpoint.get("image_encoder") and "vqgan" not in checkpoint:
        raise InputError("--image-encoder goes with --vqgan, which has it")
    if building and not tensorrt:
        raise InputError(f"{TENSORRT_OPTIONS[next(iter(building))]} goes with --tensorrt")
    if engine and not converting and not tensorrt:
        raise InputError("--engine is made in another precision, or built: expected --precision fp16 or int8, or --tensorrt")
    if precision != "int8" and (calibration or calibration_file):
        option = CALIBRATION_OPTIONS[next(iter(calibration))] if calibration else "--calibration"
        raise InputError(f"{option} goes with --precision int8")
    if precision != "int8" and float_type:
        raise InputError("--float-type goes with --precision int8")
    if numbers and engine and not tensorrt:
        raise InputError("--steps goes with --ckpt or --tensorrt; an engine brings its own")
    if len(numbers) > 1 and not tensorrt:
        raise InputError(f"expected one number of --steps, got {steps}; more of them go with --tensorrt")
    if (out is None) != (engine is not None and not converting):
        raise InputError("expected --out with a directory to write" if out is None else f"--out: the build goes into {engine}")
    if tensorrt:
        with needs("gpu", "--tensorrt"):
            from .tensorrt_build import check_options
        check_options(**building)
    written = engine
    if out is not None:
        # What later steps read too: nothing may go before they find out.
        check_target(out, force, (ckpt, engine, *(options[name] for name in ("vqgan", "class_names", "refit", "timing_cache"))))
        written = out
        if numbers:
            checkpoint["steps"] = numbers[0]

        def check(model: ModelInfo) -> None:
            for count in numbers:
                check_steps(model.length, count)

        if precision == "fp32":
            assert ckpt is not None
            export_checkpoint(ckpt, out, force, report, check, **checkpoint)
            report(f"engine written to {out}")
        else:
            chosen = conversion(precision, float_type, calibration, calibration_file)
            if engine:
                check(read_manifest(engine).model)
            convert(ckpt, engine, out, chosen, calibration_file, force, report, check, checkpoint)
    if tensorrt:
        from .tensorrt_build import build_engine

        assert written is not None
        build = build_engine(written, numbers, force=force, report=report, progress=True, **building)
        report(f"TensorRT build for {build.platform}: {written / build.folder}")


def convert(
    ckpt: Path | None,
    engine: Path | None,
    out: Path,
    chosen: tuple[Precision, Any],
    calibration_file: Path | None,
    force: bool,
    report: Any,
    check: Callable[[ModelInfo], None],
    checkpoint: dict[str, Any],
) -> None:
    """Makes an engine in another precision, from a float32 one or from a checkpoint by way of one."""
    from .convert import calibration_labels, check_calibration_file, convert_engine

    if engine:
        convert_engine(engine, out, *chosen, calibration_file, force, report, progress=True)
        return
    assert ckpt is not None
    if calibration_file:
        check_calibration_file(calibration_file, out)

    def check_both(model: ModelInfo) -> None:
        check(model)
        calibration_labels(model, chosen[1])

    between = beside(out.absolute(), "float32")
    try:
        export_checkpoint(ckpt, between, force, report, check_both, **checkpoint)
        convert_engine(between, out, *chosen, calibration_file, force, report, progress=True)
    finally:
        gc.collect()  # graphs that were read from the folder map its files
        shutil.rmtree(between, ignore_errors=True)


def export_checkpoint(
    ckpt: Path,
    out: Path,
    force: bool,
    report: Any,
    check: Callable[[ModelInfo], object],
    class_names: Path | None = None,
    **options: Any,
) -> None:
    with needs("export,cpu", "exporting a checkpoint"):
        from .engine import export_engine
    try:
        text = class_names.read_text("utf-8-sig") if class_names else None
    except UnicodeDecodeError as error:
        raise InputError(f"{class_names}: expected UTF-8 text, a class name a line ({error})") from error
    names = None if text is None else [line.strip() for line in text.rstrip().splitlines()]
    sampling: dict[str, Any] = {name: options.pop(name) for name in ("steps", "cfg_scale", "mask_temp", "samp_temp") if name in options}
    export_engine(ckpt, out, sampling=sampling, class_names=names, force=force, report=report, check=check, **options)


def conversion(precision: str, float_type: str | None, options: dict[str, Any], calibration_file: Path | None) -> tuple[Precision, Any]:
    """The precision and the calibration's settings of a command line: what it does not say, an earlier calibration's file does."""
    with needs("calibration,cpu", f"--precision {precision}"):
        from ..calibration.calibrate import Settings, shared_settings
        from .convert import Precision
    if "weight_bits" in options:
        options["weight_bits"] = int(options["weight_bits"])
    if "classes" in options:
        options["classes"] = (options["classes"],)
    if "float_layers" in options:
        words = [word.strip() for word in options["float_layers"].split(",") if word.strip()]
        if not words:
            raise InputError(f"--float-layers: expected words with commas between, got {options['float_layers']!r}")
        options["float_layers"] = () if words == ["none"] else tuple(words)
    if calibration_file and calibration_file.is_file():
        options = {**shared_settings(calibration_file), **options}
    return Precision(precision, float_type or "fp32"), Settings(**options)


if __name__ == "__main__":
    main()
