"""`enat-export`: an engine from a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from ..models.presets import PRESETS
from ..runtime.command import Command


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--ckpt", type=click.Path(path_type=Path), required=True, help="The network: .pth, .ckpt or .safetensors.")
@click.option("--vqgan", type=click.Path(path_type=Path), help="The image tokenizer; without it the engine gives tokens only.")
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
@click.option("--image-encoder/--no-image-encoder", default=True, show_default=True, help="Export the tokenizer's encoder too.")
@click.option("--force", is_flag=True, help="Replace an engine that exists.")
def main(
    ckpt: Path,
    vqgan: Path | None,
    out: Path,
    preset_name: str | None,
    heads: int | None,
    encoder_depth: int | None,
    class_names: Path | None,
    image_encoder: bool,
    force: bool,
    **sampling: Any,
) -> None:
    """Export a checkpoint as an engine: graphs traced, verified, and put in place only when all is well."""
    started = time.perf_counter()
    try:
        from .engine import export_engine
    except ImportError as error:
        raise click.ClickException(
            f"exporting needs PyTorch and ONNX ({error}); install them with: pip install 'enat[export,cpu]'"
        ) from error
    names = class_names.read_text("utf-8").splitlines() if class_names else None
    export_engine(
        ckpt,
        out,
        vqgan=vqgan,
        preset_name=preset_name,
        heads=heads,
        encoder_depth=encoder_depth,
        sampling={name: value for name, value in sampling.items() if value is not None},
        class_names=names,
        image_encoder=image_encoder,
        force=force,
        report=lambda line: click.echo(f"[{time.perf_counter() - started:6.1f} s] {line}", err=True),
    )
