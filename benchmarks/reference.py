"""The reference that everything is compared with: the network in eager PyTorch, run the way the published code runs it, on the
network's device.

Explicit attention; the modulations and the logits of all positions computed anew at every step; the two guidance branches one after
the other; nothing cached, nothing fused. It must be neither slowed nor helped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.network import Block, Network
from ..runtime.schedule import Step


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def attention(block: Block, x: Tensor, y: Tensor, split: int) -> Tensor:
    """x [B, N, D] own tokens; y [B, split + N, D] the context and the own tokens again."""
    attn = block.attn
    key_value = torch.cat((attn.kv["A"](y[:, :split]), attn.kv["B"](y[:, split:])), dim=1) if split else attn.kv["B"](y)
    query = attn.split_heads(attn.q(x))
    key, value = map(attn.split_heads, key_value.chunk(2, dim=-1))
    scores = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    x = scores.softmax(dim=-1) @ value
    return attn.proj(x.transpose(1, 2).flatten(2))


def run_block(block: Block, x: Tensor, context: Tensor, condition: Tensor) -> Tensor:
    chunks = block.adaLN_modulation(condition).chunk(8, dim=1)
    shift_self, scale_self, shift_context, scale_context, gate_attn, shift_mlp, scale_mlp, gate_mlp = chunks
    # The own tokens stand behind the context, and are normalized there and for the queries.
    y, split = torch.cat((context, x), dim=1), context.shape[1]
    y = torch.cat((modulate(y[:, :split], shift_context, scale_context), modulate(y[:, split:], shift_self, scale_self)), dim=1)
    x = x + gate_attn.unsqueeze(1) * attention(block, modulate(x, shift_self, scale_self), y, split)
    return x + gate_mlp.unsqueeze(1) * block.mlp(modulate(x, shift_mlp, scale_mlp))


class Branch(NamedTuple):
    """What one guidance branch carries into its next step."""

    features: Tensor  # [B, L, D]: of all positions
    is_masked: Tensor  # [B, L]


def run_network(network: Network, ids: Tensor, labels: Tensor, previous: Branch | None) -> tuple[Tensor, Branch]:
    """One step for one branch: ids [B, L] with codes for [MASK]; labels [B] → logits [B, L, K] of all positions."""
    config = network.config
    batch, length = ids.shape
    condition = network.y_embedder(labels)
    x = network.x_embedder(ids, torch.arange(length, device=ids.device)[None])

    def pick(grid: Tensor, which: Tensor) -> Tensor:
        return grid[which].view(batch, -1, config.dim)

    is_masked = ids == config.mask_token
    is_new, context = ~is_masked, x[:, :0]
    if previous is not None:
        is_new = is_new & previous.is_masked
        context = network.prev_proj(pick(previous.features, ~previous.is_masked)).to(x.dtype)
    new = pick(x, is_new)
    if new.shape[1]:
        for block in network.encoder_blocks:
            new = run_block(block, new, context, condition)  # type: ignore[arg-type]
    # All visible ones, in the order of their positions.
    visible = torch.empty_like(x)
    visible[is_new] = new.flatten(0, 1).to(x.dtype)
    visible[~is_masked & ~is_new] = context.flatten(0, 1)
    visible = pick(visible, ~is_masked)
    masked = pick(x, is_masked)
    for block in network.decoder_blocks:
        masked = run_block(block, masked, visible, condition)  # type: ignore[arg-type]
    features = torch.empty_like(x).masked_scatter(~is_masked[..., None], visible)
    features = features.masked_scatter(is_masked[..., None], masked.to(x.dtype))
    logits = network.mlm_layer(network.norm(features), network.x_embedder.word_embeddings.weight)
    return logits, Branch(features, is_masked)


@torch.inference_mode()
def generate_tokens(network: Network, labels: Sequence[int], steps: Sequence[Step], seed: int = 0) -> Tensor:
    """Draws tokens [B, L] in `steps` steps."""
    config = network.config
    torch.manual_seed(seed)
    batch, length = len(labels), config.length
    device = network.x_embedder.word_embeddings.weight.device
    conditional = torch.tensor(labels, device=device)
    null = torch.full_like(conditional, config.null_class)
    ids = torch.full((batch, length), config.mask_token, device=device)
    branch = null_branch = None
    for step in steps:
        logits, branch = run_network(network, ids, conditional, branch)
        # Both branches at every step, the first too, where the guidance is 0.
        null_logits, null_branch = run_network(network, ids, null, null_branch)
        logits = logits + step.guidance * (logits - null_logits)
        logp = logits.log_softmax(-1)
        sampled = torch.distributions.Categorical(logits=logp / step.sampling_temperature).sample()
        is_masked = ids == config.mask_token
        sampled = torch.where(is_masked, sampled, ids)
        gumbel = -(-torch.rand(batch, length, device=device).clamp(1e-9, 1 - 1e-7).log()).log()
        confidence = logp.gather(2, sampled[..., None]).squeeze(2) + step.mask_temperature * gumbel
        confidence = torch.where(is_masked, confidence, math.inf)
        stay = confidence.argsort(1)[:, : step.keep]
        ids = sampled.scatter(1, stay, config.mask_token)
    return ids
