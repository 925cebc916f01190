"""Trains the demo's network the paper's way, on the tokens of rendered letters.

python -m enat.demo.train_network --fonts work/fonts --tokenizer work/tokenizer/vqgan.ckpt --out work/network
"""

from __future__ import annotations

import copy
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..models.checkpoint import load_tokenizer
from ..models.config import NetworkConfig
from ..models.network import Network
from ..models.tokenizer import Tokenizer
from ..runtime.files import WholeFile
from ..runtime.manifest import sha256
from .fonts import CLASSES
from .letters import Glyphs, draw_pictures
from .training import Run, as_images, autocast, pick_device, warmup_cosine

CLASS_DROPOUT = 0.15
REUSE_PROBABILITY = 0.5
LABEL_SMOOTHING = 0.1
MASK_RATIO = (12.0, 3.0)  # of the Beta distribution


def initialize(network: Network) -> None:
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for block in network.blocks:  # every block starts as the identity
        nn.init.zeros_(block.adaLN_modulation[1].weight)  # type: ignore[index, union-attr]


@torch.inference_mode()
def encode_pictures(tokenizer: Tokenizer, pictures: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [N, 64, 64, 3] → tokens int16 [N, L]."""
    tokens = []
    for start in tqdm(range(0, len(pictures), 256), desc="encoding", mininterval=2):
        images = as_images(pictures[start : start + 256], device)
        with autocast(device):
            z = tokenizer.encoder(images)
        tokens.append(tokenizer.quantize.nearest(z.float()).short().cpu())
    return torch.cat(tokens)


def training_tokens(cache: Path, fonts: Path, tokenizer: Path, pictures: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The training pictures as tokens [N, L] and their labels [N], drawn and encoded once for a tokenizer and a number of pictures."""
    made_from = f"{sha256(tokenizer)} {pictures}"
    if cache.exists():
        with np.load(cache) as data:
            if data["made_from"] == made_from:
                return torch.from_numpy(data["tokens"]).long(), torch.from_numpy(data["labels"])
    drawn, labels = draw_pictures(Glyphs(fonts, "train"), pictures, seed=1)
    tokens = encode_pictures(load_tokenizer(tokenizer).to(device), drawn, device)
    with WholeFile(cache) as partial, partial.open("wb") as file:
        np.savez(file, tokens=tokens.numpy(), labels=labels, made_from=made_from)
    return tokens.long(), torch.from_numpy(labels)


def training_loss(network: Network, ema: Network, tokens: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
    """One step's loss. tokens [B, L], labels [B]; one mask ratio for the batch, other positions for every picture."""
    batch, length = tokens.shape
    masked = int(np.clip(round(rng.beta(*MASK_RATIO) * length), 1, length))
    visible = length - masked
    order = torch.rand(batch, length, device=tokens.device).argsort(1)  # masked positions first, then the visible ones
    dropped = torch.rand(batch, device=tokens.device) < CLASS_DROPOUT
    labels = labels.masked_fill(dropped, network.config.null_class)
    encoder_modulation, decoder_modulation = network.modulation(labels)

    def embedded(model: Network, positions: Tensor) -> Tensor:
        return model.x_embedder(tokens.gather(1, positions), positions)

    features = None
    if visible:
        seen_count = int(rng.integers(1, visible + 1)) if rng.random() < REUSE_PROBABILITY else 0
        seen, new = order[:, masked : masked + seen_count], order[:, masked + seen_count :]
        if seen_count:
            with torch.no_grad():
                features = ema.encode(embedded(ema, seen), None, ema.modulation(labels)[0])
        features = network.encode(embedded(network, new), features, encoder_modulation)
    positions = order[:, :masked]
    logits = network.decode(network.embed_masked(positions), features, decoder_modulation)
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.gather(1, positions).flatten(), label_smoothing=LABEL_SMOOTHING)


@click.command()
@click.option("--fonts", type=click.Path(exists=True, path_type=Path), required=True, help="Folder made by enat.demo.fonts.")
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), required=True, help="vqgan.ckpt of enat.demo.train_tokenizer.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run; goes on where it stopped.")
@click.option("--pictures", default=1500, show_default=True, help="Training pictures a class.")
@click.option("--steps", default=6000, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option(
    "--ema", "ema_decay", default=0.9999, show_default=True, help="Largest decay of the averaged weights; short runs average less."
)
@click.option("--device", default=None, help="cpu or cuda; default: cuda where there is one.")
def main(
    fonts: Path,
    tokenizer: Path,
    out: Path,
    pictures: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    ema_decay: float,
    device: str | None,
) -> None:
    """Train the demo's network."""
    where = pick_device(device)
    out.mkdir(parents=True, exist_ok=True)
    tokens, labels = training_tokens(out / "tokens.npz", fonts, tokenizer, pictures, where)
    codes = load_tokenizer(tokenizer).config.codes
    torch.manual_seed(0)
    config = NetworkConfig(
        grid=round(tokens.shape[1] ** 0.5), dim=192, heads=3, encoder_depth=3, decoder_depth=2, codes=codes, num_classes=len(CLASSES)
    )
    network = Network(config)
    initialize(network)
    network.to(where)
    ema = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.99, 0.99), weight_decay=0.03)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, steps // 20))
    run = Run(out, steps, network=network, ema=ema, optimizer=optimizer, schedule=schedule)
    for step in run.remaining():
        rng = np.random.default_rng((2, step))
        chosen = torch.randint(len(tokens), (batch_size,))
        with autocast(where):
            loss = training_loss(network, ema, tokens[chosen].to(where), labels[chosen].to(where), rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(ema_decay, (step + 1) / (step + 10), 1 - 20 / steps)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
        run.finish_step(loss=loss)
    torch.save(ema.state_dict(), out / "nnet_ema.pth")


if __name__ == "__main__":
    main()
