"""Trains the demo's image tokenizer: 64×64 pictures as 8×8 tokens.

    python -m enat.demo.train_tokenizer --fonts work/fonts --out work/tokenizer

A plain autoencoder first, then its features are clustered (k-means) and training goes on through the codebook, which follows the
features as a moving average (van den Oord et al., "Neural Discrete Representation Learning", 2017, appendix A.1).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.tokenizer import Tokenizer, TokenizerConfig
from .letters import Glyphs, draw_pictures
from .training import Run, as_images, autocast, pick_device, warmup_cosine

CONFIG = TokenizerConfig(channels=(64, 64, 64, 64), encoder_blocks=1, decoder_blocks=1, codes=512, code_dim=32)
WARMUP_STEPS = 500  # without the codebook
COMMITMENT = 0.25


class MovingCodebook:
    """The codebook as a moving average of the features that chose each code; codes that nothing chooses are moved to features."""

    def __init__(self, embedding: Tensor, decay: float = 0.98) -> None:
        self.embedding, self.decay = embedding, decay
        self.counts = torch.ones(len(embedding), device=embedding.device)
        self.sums = embedding.clone()
        self.recent: list[Tensor] = []  # features [N, Z] to begin with

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts, "sums": self.sums, "recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts, self.sums, *self.recent = (one.to(self.embedding.device) for one in (state["counts"], state["sums"], *state["recent"]))

    @torch.no_grad()
    def start(self, features: Tensor, iterations: int = 20) -> None:
        """k-means on features [N, Z]."""
        codes = features[torch.randperm(len(features), device=features.device)[: len(self.embedding)]].clone()
        for _ in range(iterations):
            chosen = torch.cdist(features, codes).argmin(1)
            counts = torch.bincount(chosen, minlength=len(codes)).float()
            sums = torch.zeros_like(codes).index_add_(0, chosen, features)
            empty = counts == 0
            codes = torch.where(
                empty[:, None],
                features[torch.randint(len(features), (len(codes),), device=features.device)],
                sums / counts.clamp(min=1)[:, None],
            )
        self.embedding.copy_(codes)
        self.sums.copy_(codes)
        self.counts.fill_(1)

    @torch.no_grad()
    def update(self, features: Tensor, chosen: Tensor) -> None:
        """features [N, Z], and the code that each chose [N]."""
        counts = torch.bincount(chosen, minlength=len(self.counts)).float()
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, chosen, features), 1 - self.decay)
        unused = self.counts < 0.03
        fresh = features[torch.randint(len(features), (int(unused.sum()),), device=features.device)]
        self.sums[unused], self.counts[unused] = fresh, 1.0
        self.embedding.copy_(self.sums / self.counts[:, None])


# GroupNorm takes the mean and the scale out of its groups, here of two channels each, and with them the colour of plain pictures:
# training hardly begins (pixel error 0.19 after 120 steps, and 0.10 so). With eps = 1 instead of 1e-6 the normalization of small
# features is close to linear. The same network with eps = 1e-6 is the one whose features are a thousandth as large.
TRAINING_EPS = 1.0


def set_eps(model: nn.Module, eps: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = eps


def published(model: Tokenizer) -> Tokenizer:
    """The model trained with TRAINING_EPS as one that computes the same with the published eps, in place: whatever a GroupNorm
    normalizes is made smaller by the root of the ratio."""
    scale = (1e-6 / TRAINING_EPS) ** 0.5
    for name, module in model.named_modules():
        if name.endswith(("conv_in", "conv1", "conv2")):
            module.weight.data *= scale  # type: ignore[operator, union-attr]
        if name.endswith(("conv_in", "upsample.conv")) and module.bias is not None:
            module.bias.data *= scale  # type: ignore[operator, union-attr]
    set_eps(model, 1e-6)
    return model


def picture_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 of the pixels and, so that edges stay sharp, of their differences along both axes at three scales."""
    loss = (decoded - images).abs().mean()
    for _ in range(3):
        for axis in (2, 3):
            loss = loss + (decoded.diff(dim=axis) - images.diff(dim=axis)).abs().mean()
        decoded, images = F.avg_pool2d(decoded, 2), F.avg_pool2d(images, 2)
    return loss


@click.command()
@click.option("--fonts", type=click.Path(exists=True, path_type=Path), required=True, help="Folder made by enat.demo.fonts.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run; goes on where it stopped.")
@click.option("--pictures", default=1500, show_default=True, help="Training pictures a class.")
@click.option("--steps", default=3300, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--device", default=None, help="cpu or cuda; default: cuda where there is one.")
def main(fonts: Path, out: Path, pictures: int, steps: int, batch_size: int, device: str | None) -> None:
    """Train the demo's image tokenizer."""
    where = pick_device(device)
    data, _ = draw_pictures(Glyphs(fonts, "train"), pictures, seed=1)
    torch.manual_seed(0)
    model = Tokenizer(CONFIG).to(where)
    set_eps(model, TRAINING_EPS)
    codebook = MovingCodebook(model.quantize.embedding.weight.data)
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, 100))
    run = Run(out, steps, model=model, codebook=codebook, optimizer=optimizer, schedule=schedule)
    for step in run.remaining():
        images = as_images(data[torch.randint(len(data), (batch_size,)).numpy()], where)
        with autocast(where):
            z = model.encoder(images).float()
        features = z.permute(0, 2, 3, 1).flatten(0, 2)  # [B·64, Z]
        if step < WARMUP_STEPS:
            quantized, commitment = z, z.new_zeros(())
            codebook.recent = [*codebook.recent[-63:], features.detach()]
        else:
            if codebook.recent:
                codebook.start(torch.cat(codebook.recent))
                codebook.recent = []
            chosen = model.quantize.nearest(z.detach())
            picked = model.quantize.embedding(chosen).detach().transpose(1, 2).view_as(z)
            commitment = F.mse_loss(z, picked)
            quantized = z + (picked - z).detach()
            codebook.update(features.detach(), chosen.flatten())
        with autocast(where):
            decoded = model.decoder(quantized).float()
        loss = picture_loss(decoded, images)
        optimizer.zero_grad()
        (loss + COMMITMENT * commitment).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        run.finish_step(loss=loss, pixels=(decoded - images).abs().mean(), commitment=commitment)
    torch.save(published(model).state_dict(), out / "vqgan.ckpt")


if __name__ == "__main__":
    main()
