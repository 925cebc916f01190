"""The ENAT network: visible tokens are encoded, [MASK] tokens are decoded conditioned on them.

Ni et al., "ENAT: Rethinking Spatial-temporal Interactions in Token-based Image Synthesis", NeurIPS 2024.
Module names follow the published checkpoints, so that a state dict loads as it is.

Shapes in the comments: B images, R network rows (B, or 2·B with guidance), N own tokens, M context tokens,
L tokens an image, D width, K codes, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import NetworkConfig

# What one block takes from the class: in the order in which the checkpoint's Linear(D → 8·D) gives them.
MODULATIONS = ("shift_self", "scale_self", "shift_context", "scale_context", "gate_attn", "shift_mlp", "scale_mlp", "gate_mlp")


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    """Queries from the own tokens; keys and values from the context (weights A) and from the own tokens (weights B)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.ModuleDict({"A": nn.Linear(dim, 2 * dim), "B": nn.Linear(dim, 2 * dim)})
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        key_value = self.kv["B"](x)  # [R, N, 2D]: keys, then values
        if y is not None:
            key_value = torch.cat((self.kv["A"](y), key_value), dim=1)  # [R, M+N, 2D]
        key, value = key_value.chunk(2, dim=-1)
        x = F.scaled_dot_product_attention(self.split_heads(self.q(x)), self.split_heads(key), self.split_heads(value))
        return self.proj(x.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [R, heads, N, head_dim]


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(dim, heads)
        self.mlp = MLP(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, len(MODULATIONS) * dim))

    def forward(self, x: Tensor, context: Tensor | None, modulation: Tensor) -> Tensor:
        """x [R, N, D] own tokens; context [R, M, D], *normalized already* (it is the same for every block); modulation [R, 8, D]."""
        shift_self, scale_self, shift_context, scale_context, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.split(
            1, dim=1
        )  # each [R, 1, D]
        own = normalize(x) * scale_self + shift_self
        if context is not None:
            context = context * scale_context + shift_context
        x = x + gate_attn * self.attn(own, context)
        return x + gate_mlp * self.mlp(normalize(x) * scale_mlp + shift_mlp)


class TokenEmbedder(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.codes + 1, config.dim)
        self.position_embeddings = nn.Embedding(config.length, config.dim)
        self.LayerNorm = nn.LayerNorm(config.dim, eps=1e-6)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.LayerNorm(self.word_embeddings(tokens) + self.position_embeddings(positions))


class LabelEmbedder(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class PreviousProjection(nn.Module):
    """Carries the features of the seen tokens into the next step."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.mlp(self.norm(features))


class MLMHead(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.dim, config.dim)
        self.ln = nn.LayerNorm(config.dim, eps=1e-5)
        self.bias = nn.Parameter(torch.zeros(1, 1, config.codes + 1))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        x = self.ln(F.gelu(self.fc(x)))
        # [MASK] itself is never predicted: its column is dropped.
        return F.linear(x, word_embeddings[:-1], self.bias[0, 0, :-1])


class Network(nn.Module):
    """The ENAT network as its two halves; the sampling loop carries the features between them."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = TokenEmbedder(config)
        self.y_embedder = LabelEmbedder(config)
        self.prev_proj = PreviousProjection(config.dim)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads) for _ in range(config.encoder_depth + config.decoder_depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-5)
        self.mlm_layer = MLMHead(config)

    @property
    def encoder_blocks(self) -> nn.ModuleList:
        return self.blocks[: self.config.encoder_depth]  # type: ignore[return-value]

    @property
    def decoder_blocks(self) -> nn.ModuleList:
        return self.blocks[self.config.encoder_depth :]  # type: ignore[return-value]

    def modulation(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """labels [R] → the encoder's and the decoder's, [R, blocks, 8, D] each, in the order of MODULATIONS, the scales as 1 + scale.

        No timestep enters the network: these depend on the label alone and never change during sampling.
        """
        condition = self.y_embedder(labels)
        one = torch.tensor([float(name.startswith("scale")) for name in MODULATIONS], device=condition.device)[:, None]

        def of(blocks: nn.ModuleList) -> Tensor:
            chunks = [block.adaLN_modulation(condition).unflatten(-1, (len(MODULATIONS), -1)) for block in blocks]  # type: ignore[operator]
            return torch.stack(chunks, dim=1) + one.to(condition.dtype)

        return of(self.encoder_blocks), of(self.decoder_blocks)

    def encode(self, embedded: Tensor, features: Tensor | None, modulation: Tensor) -> Tensor:
        """One step of the encoder.

        embedded [R, new, D]: the newly revealed tokens, from `x_embedder`; features [R, seen, D]: of the tokens seen before, as the
        last step left them (None: nothing seen); modulation [R, encoder blocks, 8, D]
        → features of all visible tokens [R, seen + new, D], the seen ones first.
        """
        x, context = embedded, None
        if features is not None:
            features = self.prev_proj(features)
            context = normalize(features)
        for i, block in enumerate(self.encoder_blocks):
            x = block(x, context, modulation[:, i])
        return x if features is None else torch.cat((features, x), dim=1)

    def decode(self, embedded: Tensor, features: Tensor | None, modulation: Tensor) -> Tensor:
        """embedded [R, masked, D]: [MASK] at the masked positions; features [R, visible, D] (None: nothing is visible);
        modulation [R, decoder blocks, 8, D] → logits [R, masked, K]."""
        x = embedded
        context = None if features is None else normalize(features)
        for i, block in enumerate(self.decoder_blocks):
            x = block(x, context, modulation[:, i])
        return self.mlm_layer(self.norm(x), self.x_embedder.word_embeddings.weight)

    def embed_masked(self, positions: Tensor) -> Tensor:
        """positions [B, masked] → [MASK] embedded there [B, masked, D]."""
        return self.x_embedder(torch.full_like(positions, self.config.mask_token), positions)


def normalize(x: Tensor) -> Tensor:
    """LayerNorm without affine, as every modulated LayerNorm of the network."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)
