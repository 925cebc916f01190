"""The engine's graphs as PyTorch modules, in the form in which they are traced: inputs and outputs as in the engine contract.

Tokens and positions are per image; where guidance doubles the rows, the graphs repeat what they embedded, so that callers never do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.network import Attention, MLMHead, Network
from ..models.tokenizer import ResBlock, Tokenizer, Upsample, to_uint8


class LeanAttention(nn.Module):
    """Attention with less to do at run time: products for keys and for values are apart, so that nothing is cut in two; the scale
    head_dim^-0.5 is in the query's weights; and to the context's keys and values nothing is added. What all keys have in common, softmax
    does not see, and what all values have in common, comes out of it as it is: own tokens get the difference, and `proj` the rest.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.split_heads = attention.split_heads
        proj = attention.proj
        own: nn.Linear = attention.kv["B"]  # type: ignore[assignment]
        context: nn.Linear = attention.kv["A"]  # type: ignore[assignment]
        scale = (attention.q.out_features // attention.heads) ** -0.5
        self.q = linear(attention.q.weight * scale, attention.q.bias * scale)
        (own_key, own_value), (key, value) = own.weight.chunk(2), context.weight.chunk(2)
        (own_key_bias, own_value_bias), (_, value_bias) = (own.bias - context.bias).chunk(2), context.bias.chunk(2)
        self.own_key, self.own_value = linear(own_key, own_key_bias), linear(own_value, own_value_bias)
        self.context_key, self.context_value = linear(key), linear(value)
        self.proj = linear(proj.weight, proj.bias + proj.weight @ value_bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        key = torch.cat((self.context_key(y), self.own_key(x)), dim=1)
        value = torch.cat((self.context_value(y), self.own_value(x)), dim=1)
        query, key, value = map(self.split_heads, (self.q(x), key, value))
        x = (query @ key.transpose(-1, -2)).softmax(-1) @ value
        return self.proj(x.transpose(1, 2).flatten(2))


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    result = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    result.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        result.bias = nn.Parameter(bias, requires_grad=False)
    return result


class LeanHead(nn.Module):
    """The prediction of tokens with the embeddings of the codes as constant weights, [MASK]'s cut off beforehand."""

    def __init__(self, head: MLMHead, word_embeddings: Tensor) -> None:
        super().__init__()
        self.fc, self.ln = head.fc, head.ln
        self.words = linear(word_embeddings[:-1], head.bias[0, 0, :-1])

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        return self.words(self.ln(F.gelu(self.fc(x))))


@contextlib.contextmanager
def replaced(replacements: Sequence[tuple[nn.Module, str, nn.Module]]) -> Iterator[None]:
    """Inside, modules have others in place of those of a name: (module, name, other)."""
    originals = [(module, name, getattr(module, name)) for module, name, _ in replacements]
    try:
        for module, name, other in replacements:
            setattr(module, name, other)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def lean(network: Network) -> AbstractContextManager[None]:
    """Inside, the head and every block's attention are in the form for tracing."""
    head = LeanHead(network.mlm_layer, network.x_embedder.word_embeddings.weight)
    return replaced([(network, "mlm_layer", head), *((block, "attn", LeanAttention(block.attn)) for block in network.blocks)])  # type: ignore[arg-type]


class BlockConvolution(nn.Conv2d):
    """A convolution whose channels are, four by four, the pixels of a block of 2×2: upper left, upper right, lower left, lower right."""

    def __init__(self, weight: Tensor, bias: Tensor, padding: int, stride: int = 1) -> None:
        outputs, inputs, height, width = weight.shape
        super().__init__(inputs, outputs, (height, width), stride, padding, device="meta")
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(super().forward(x), 2)


class LeanUpsample(nn.Module):
    """Nearest ×2 and the 3×3 convolution behind it, as a convolution of 2×2 taps before: 4/9 of the multiply-adds.

    Around the corner where four pixels meet lies a block of 2×2 enlarged ones, which see these four alone: rows and columns of the kernel
    that fall on the same pixel are added up. There is one corner more than pixels along an edge, with blocks half outside, so
    that the outermost enlarged pixels are cut off.
    """

    def __init__(self, upsample: Upsample) -> None:
        super().__init__()
        kernel, bias = upsample.conv.weight, upsample.conv.bias
        assert bias is not None
        # [pixel of the block, pixel of the four, row of the kernel] along one edge: whether this row falls on that pixel
        falls = torch.tensor([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]], dtype=kernel.dtype)
        weight = torch.einsum("aik,bjl,ockl->oabcij", falls, falls, kernel)
        self.conv = BlockConvolution(weight.flatten(0, 2), bias.repeat_interleave(4), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[..., 1:-1, 1:-1]


def lean_conv_out(conv: nn.Conv2d) -> BlockConvolution:
    """The last 3×3 convolution, of three channels, for blocks of 2×2 pixels: 4×4 taps for twelve channels, which waste less of
    vectors of sixteen. For pictures with an even edge."""
    assert conv.bias is not None
    kernels = [F.pad(conv.weight, (right, 1 - right, down, 1 - down)) for down in (0, 1) for right in (0, 1)]  # [3, C, 4, 4] each
    return BlockConvolution(torch.stack(kernels, 1).flatten(0, 1), conv.bias.repeat_interleave(4), padding=1, stride=2)


class LeanResBlock(nn.Module):
    """A block whose width changes: its second convolution and the shortcut, which is taken from what that one gives, as one."""

    def __init__(self, block: ResBlock) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2 = block.norm1, block.conv1, block.norm2
        kernel, shortcut = block.conv2.weight, block.nin_shortcut.weight[:, :, 0, 0]
        self.conv2 = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1, bias=False, device="meta")
        self.conv2.weight = nn.Parameter(kernel + torch.einsum("om,mcij->ocij", shortcut, kernel), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h)))


def lean_decoder(tokenizer: Tokenizer) -> AbstractContextManager[None]:
    """Inside, the image decoder is in the form for tracing."""
    decoder = tokenizer.decoder
    replacements: list[tuple[nn.Module, str, nn.Module]] = []
    for level in decoder.up:
        if hasattr(level, "upsample"):
            replacements.append((level, "upsample", LeanUpsample(level.upsample)))  # type: ignore[arg-type]
        for name, block in level.block.named_children():  # type: ignore[union-attr]
            if hasattr(block, "nin_shortcut"):
                replacements.append((level.block, name, LeanResBlock(block)))  # type: ignore[arg-type]
    if len(decoder.up) > 1:  # the picture's edge is even
        replacements.append((decoder, "conv_out", lean_conv_out(decoder.conv_out)))
    return replaced(replacements)


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


def unit_pixels(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] → float [B, 3, H, W] in [0, 1]."""
    return images.float().permute(0, 3, 1, 2) / 255


class ImageEncoderGraph(nn.Module):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(unit_pixels(images))
