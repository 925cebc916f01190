"""The sizes of a network, without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CheckpointError


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of a network. `grid²` tokens an image, `codes` entries in the tokenizer's codebook."""

    grid: int
    dim: int
    heads: int
    encoder_depth: int
    decoder_depth: int
    codes: int
    num_classes: int

    def __post_init__(self) -> None:
        if self.heads < 1 or self.dim % self.heads:
            raise CheckpointError(f"the width {self.dim} must be divisible by the number of heads, got {self.heads}")
        if self.encoder_depth < 1 or self.decoder_depth < 1:
            raise CheckpointError(f"encoder and decoder need at least one block each, got {self.encoder_depth} and {self.decoder_depth}")

    @property
    def length(self) -> int:
        """Tokens an image."""
        return self.grid**2

    @property
    def mask_token(self) -> int:
        return self.codes

    @property
    def null_class(self) -> int:
        return self.num_classes
