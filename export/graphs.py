"""The engine's graphs as PyTorch modules, in the form in which they are traced: inputs and outputs as in the engine contract.

Tokens and positions are per image; where guidance doubles the rows, the graphs repeat what they embedded, so that callers never do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.network import Attention, MLMHead, Network
from ..models.tokenizer import Tokenizer, to_uint8


class LeanAttention(nn.Module):
    """Attention with less to do at run time: products for keys and for values are apart, so that nothing is cut in two, and the
    scale head_dim^-0.5 is in the query's weights."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.split_heads = attention.split_heads
        scale = (attention.q.out_features // attention.heads) ** -0.5
        self.q = linear(attention.q.weight * scale, attention.q.bias * scale)
        self.own_key, self.own_value = halves(attention.kv["B"])
        self.context_key, self.context_value = halves(attention.kv["A"])
        self.proj = attention.proj

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        key = torch.cat((self.context_key(y), self.own_key(x)), dim=1)
        value = torch.cat((self.context_value(y), self.own_value(x)), dim=1)
        query, key, value = map(self.split_heads, (self.q(x), key, value))
        x = (query @ key.transpose(-1, -2)).softmax(-1) @ value
        return self.proj(x.transpose(1, 2).flatten(2))


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    result = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    result.weight, result.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return result


def halves(both: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """A Linear(D → 2D) as two of D → D, on the same memory."""
    first, second = map(linear, both.weight.chunk(2), both.bias.chunk(2))  # type: ignore[operator, union-attr, arg-type]
    return first, second


class LeanHead(nn.Module):
    """The prediction of tokens with the embeddings of the codes as constant weights, [MASK]'s cut off beforehand."""

    def __init__(self, head: MLMHead, word_embeddings: Tensor) -> None:
        super().__init__()
        self.fc, self.ln = head.fc, head.ln
        self.words = linear(word_embeddings[:-1], head.bias[0, 0, :-1])

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        return self.words(self.ln(F.gelu(self.fc(x))))


@contextlib.contextmanager
def lean(network: Network) -> Iterator[None]:
    """Inside, the head and every block's attention are in the form for tracing."""
    head, originals = network.mlm_layer, [block.attn for block in network.blocks]
    network.mlm_layer = LeanHead(head, network.x_embedder.word_embeddings.weight)  # type: ignore[assignment]
    for block in network.blocks:
        block.attn = LeanAttention(block.attn)  # type: ignore[arg-type]
    try:
        yield
    finally:
        network.mlm_layer = head
        for block, original in zip(network.blocks, originals, strict=True):
            block.attn = original


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """x [batch, …] → [rows, …]: row r is image r mod batch."""
    return torch.cat((x, x))[:rows]


class EncoderGraph(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, positions: Tensor, features: Tensor, encoder_modulation: Tensor) -> Tensor:
        embedded = repeat_rows(self.network.x_embedder(tokens, positions), encoder_modulation.shape[0])
        return self.network.encode(embedded, features, encoder_modulation)


class DecoderGraph(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        # [MASK] embedded at every position never changes: a table.
        self.masked = nn.Parameter(network.embed_masked(torch.arange(network.config.length)), requires_grad=False)

    def forward(self, positions: Tensor, features: Tensor, decoder_modulation: Tensor) -> Tensor:
        embedded = repeat_rows(nn.functional.embedding(positions, self.masked), decoder_modulation.shape[0])
        return self.network.decode(embedded, features, decoder_modulation)


class ImageDecoderGraph(nn.Module):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        raster = torch.zeros_like(tokens).scatter(1, positions, tokens)
        return to_uint8(self.tokenizer.decode(raster))


class ImageEncoderGraph(nn.Module):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images.float().permute(0, 3, 1, 2) / 255)
