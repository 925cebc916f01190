"""The reference that everything is compared with: the network in eager PyTorch, run the way the published code runs it, on the
device that is PyTorch's default.

Explicit attention; the modulations and the logits of all positions computed anew at every step; the two guidance branches one after
the other; nothing cached, nothing fused. It must be neither slowed nor helped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.network import Block, Network
from ..runtime.schedule import Step


def attention(block: Block, x: Tensor, y: Tensor | None) -> Tensor:
    attn = block.attn
    key_value = attn.kv["B"](x)
    if y is not None:
        key_value = torch.cat((attn.kv["A"](y), key_value), dim=1)
    query = attn.split_heads(attn.q(x))
    key, value = map(attn.split_heads, key_value.chunk(2, dim=-1))
    scores = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    x = scores.softmax(dim=-1) @ value
    return attn.proj(x.transpose(1, 2).flatten(2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def run_block(block: Block, x: Tensor, context: Tensor | None, condition: Tensor) -> Tensor:
    chunks = block.adaLN_modulation(condition).chunk(8, dim=1)
    shift_self, scale_self, shift_context, scale_context, gate_attn, shift_mlp, scale_mlp, gate_mlp = chunks
    y = None if context is None else modulate(context, shift_context, scale_context)
    x = x + gate_attn.unsqueeze(1) * attention(block, modulate(x, shift_self, scale_self), y)
    return x + gate_mlp.unsqueeze(1) * block.mlp(modulate(x, shift_mlp, scale_mlp))


def run_network(
    network: Network, ids: Tensor, new: Tensor, seen: Tensor, features: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor | None]:
    """One step for one branch.

    ids [B, L] with codes for [MASK]; new, seen: positions of the tokens revealed by the last step and before it [B, ·]; features
    [B, seen, D] of the seen ones → logits [B, L, K] of all positions, features of all visible tokens.
    """
    config = network.config
    batch, length = ids.shape
    condition = network.y_embedder(labels)
    everything = network.x_embedder(ids, torch.arange(length).expand(batch, -1))
    pick = lambda positions: everything.gather(1, positions[..., None].expand(-1, -1, config.dim))  # noqa: E731
    context = None if features is None else network.prev_proj(features)
    visible = None
    if new.shape[1] or seen.shape[1]:
        x = pick(new)
        for block in network.encoder_blocks:
            x = run_block(block, x, context, condition)  # type: ignore[arg-type]
        visible = x if context is None else torch.cat((context, x), dim=1)
    order = torch.cat((seen, new), dim=1)
    is_masked = torch.ones(batch, length, dtype=torch.bool).scatter(1, order, False)
    masked = is_masked.nonzero()[:, 1].view(batch, -1)
    x = pick(masked)
    for block in network.decoder_blocks:
        x = run_block(block, x, visible, condition)  # type: ignore[arg-type]
    # Back onto the grid, and the logits of all positions.
    full = torch.zeros(batch, length, config.dim)
    full = full.scatter(1, masked[..., None].expand(-1, -1, config.dim), x)
    if visible is not None:
        full = full.scatter(1, order[..., None].expand(-1, -1, config.dim), visible)
    return network.mlm_layer(network.norm(full), network.x_embedder.word_embeddings.weight), visible


@torch.inference_mode()
def generate_tokens(network: Network, labels: Sequence[int], steps: Sequence[Step], seed: int = 0) -> Tensor:
    """Draws tokens [B, L] in `steps` steps."""
    config = network.config
    torch.manual_seed(seed)
    batch, length = len(labels), config.length
    conditional = torch.tensor(labels)
    null = torch.full_like(conditional, config.null_class)
    ids = torch.full((batch, length), config.mask_token)
    new = seen = torch.empty(batch, 0, dtype=torch.long)
    features: dict[str, Tensor | None] = {"conditional": None, "unconditional": None}
    for step in steps:
        logits, features["conditional"] = run_network(network, ids, new, seen, features["conditional"], conditional)
        # Both branches at every step, the first too, where the guidance is 0.
        other, features["unconditional"] = run_network(network, ids, new, seen, features["unconditional"], null)
        logits = logits + step.guidance * (logits - other)
        logp = logits.log_softmax(-1)
        sampled = torch.distributions.Categorical(logits=logp / step.sampling_temperature).sample()
        is_masked = ids == config.mask_token
        sampled = torch.where(is_masked, sampled, ids)
        gumbel = -(-torch.rand(batch, length).clamp(1e-9, 1 - 1e-7).log()).log()
        confidence = logp.gather(2, sampled[..., None]).squeeze(2) + step.mask_temperature * gumbel
        confidence = torch.where(is_masked, confidence, math.inf)
        stay = confidence.argsort(1)[:, : step.keep]
        revealed = torch.where(is_masked, sampled, ids).scatter(1, stay, config.mask_token)
        seen = torch.cat((seen, new), dim=1)
        new = (is_masked & (revealed != config.mask_token)).nonzero()[:, 1].view(batch, -1)
        ids = revealed
    return ids
