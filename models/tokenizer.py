"""The image tokenizer: MaskGIT's VQGAN (Chang et al., 2022), convolutions only, in the published checkpoint's names.

Pixels are RGB in [0, 1], channels first. A token is the index of the nearest code by squared distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenizerConfig:
    """`channels`: one width a level, from the full resolution down; every level but the last halves the resolution."""

    channels: tuple[int, ...]
    encoder_blocks: int
    decoder_blocks: int
    codes: int
    code_dim: int

    @property
    def factor(self) -> int:
        """Pixels along an edge of one token."""
        return 1 << (len(self.channels) - 1)


def Norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv3x3(inputs: int, outputs: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = Norm(inputs)
        self.conv1 = conv3x3(inputs, outputs, bias=False)
        self.norm2 = Norm(outputs)
        self.conv2 = conv3x3(outputs, outputs, bias=False)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        # Where the width changes the published network takes the shortcut from the block's output, not from its input.
        skip = self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x
        return skip + h


class Mid(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class Level(nn.Module):
    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Encoder(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = conv3x3(3, channels[0], bias=False)
        inputs = (channels[0], *channels[:-1])
        self.down = nn.ModuleList(Level(i, o, config.encoder_blocks) for i, o in zip(inputs, channels, strict=True))
        self.mid = Mid(channels[-1])
        self.norm_out = Norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.code_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            if i > 0:
                x = F.avg_pool2d(x, 2)
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = conv3x3(config.code_dim, channels[-1], bias=True)
        self.mid = Mid(channels[-1])
        inputs = (*channels[1:], channels[-1])  # a level's input is what the level below it gives
        self.up = nn.ModuleList(Level(i, o, config.decoder_blocks) for i, o in zip(inputs, channels, strict=True))
        for level, width in list(zip(self.up, channels, strict=True))[1:]:
            level.upsample = Upsample(width)
        self.norm_out = Norm(channels[0])
        self.conv_out = conv3x3(channels[0], 3, bias=True)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)  # type: ignore[operator]
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codes, config.code_dim)

    def distances(self, z: Tensor) -> Tensor:
        """z [B, Z, H, W] → squared distances to all codes [B, H·W, K], raster order: |z − e|² without |z|², which they have in common."""
        z = z.flatten(2).transpose(1, 2)  # [B, HW, Z]
        codes = self.embedding.weight
        return codes.square().sum(1) - 2 * (z @ codes.T)

    def nearest(self, z: Tensor) -> Tensor:
        """z [B, Z, H, W] → tokens [B, H·W], raster order."""
        return self.distances(z).argmin(-1)


class Tokenizer(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config)

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] → tokens [B, L], raster order."""
        return self.quantize.nearest(self.encoder(images))

    def decode(self, tokens: Tensor) -> Tensor:
        """tokens [B, L], raster order, of a square picture → images [B, 3, H, W], not yet clamped to [0, 1]."""
        grid = round(tokens.shape[1] ** 0.5)
        z = self.quantize.embedding(tokens).transpose(1, 2).unflatten(2, (grid, grid))
        return self.decoder(z)


def to_uint8(images: Tensor) -> Tensor:
    """images [B, 3, H, W], about [0, 1] → uint8 [B, H, W, 3]."""
    return torch.floor(images.clamp(0, 1) * 255 + 0.5).permute(0, 2, 3, 1).to(torch.uint8)
