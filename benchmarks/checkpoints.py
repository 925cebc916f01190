"""Checkpoints of the published sizes with random weights: for measuring speed, memory and export where the real ones are not at hand.

python -m enat.benchmarks.checkpoints --out work/l        # nnet_ema.pth (2.3 GB) and vqgan.ckpt
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.checkpoint import HEAD_DIM
from ..models.config import NetworkConfig
from ..models.network import Network
from ..models.tokenizer import Tokenizer, TokenizerConfig
from ..runtime.command import Command
from ..runtime.files import WholeFile, check_writable

ENAT_L_256 = NetworkConfig(grid=16, dim=1024, heads=16, encoder_depth=22, decoder_depth=2, codes=1024, num_classes=1000)
VQGAN_F16 = TokenizerConfig(channels=(128, 128, 256, 256, 512), encoder_blocks=2, decoder_blocks=2, codes=1024, code_dim=256)

CONTRAST = 0.2  # of pictures, as standard deviation where white is 1


def random_state(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Weights of about the scale of trained ones, in the published names; pictures are noise around grey."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in model.state_dict().items():
        if value.dim() > 1:
            fan_in = value[0].numel()
            state[name] = torch.randn(value.shape, generator=rng) * fan_in**-0.5
        else:
            is_scale = name.endswith("weight")
            state[name] = torch.full(value.shape, float(is_scale)) + 0.02 * torch.randn(value.shape, generator=rng)
        if name == "decoder.conv_out.weight":
            state[name] *= CONTRAST
        elif name == "decoder.conv_out.bias":
            state[name] += 0.5
    return state


def write_checkpoints(folder: Path, network: NetworkConfig = ENAT_L_256, tokenizer: TokenizerConfig = VQGAN_F16) -> tuple[Path, Path]:
    """Writes nnet_ema.pth and vqgan.ckpt, if they are not there yet. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "nnet_ema.pth", folder / "vqgan.ckpt"
    with torch.device("meta"):
        models = Network(network), Tokenizer(tokenizer)
    for path, model in zip(paths, models, strict=True):
        if not path.exists():
            with WholeFile(path) as partial:
                torch.save(random_state(model), partial)
    return paths


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--dim", default=ENAT_L_256.dim, show_default=True, help="Width of the network, in heads of 64.")
@click.option("--encoder-depth", default=ENAT_L_256.encoder_depth, show_default=True, help="Blocks that encode; two decode.")
def main(out: Path, dim: int, encoder_depth: int) -> None:
    """Write random checkpoints, by default of the published sizes; files that are there are kept."""
    if dim < 1 or dim % HEAD_DIM or encoder_depth < 1:
        raise InputError(f"expected a width that is a multiple of {HEAD_DIM}, and 1 or more blocks; got {dim} and {encoder_depth}")
    check_writable(out)
    there = {path for path in out.glob("*") if path.is_file()}
    network = dataclasses.replace(ENAT_L_256, dim=dim, heads=dim // HEAD_DIM, encoder_depth=encoder_depth)
    for path in write_checkpoints(out, network):
        click.echo(f"{path}: {path.stat().st_size / 1e9:.2f} GB{', was there and is kept' if path in there else ''}")


if __name__ == "__main__":
    main()
