"""What the engine contract (docs/ENGINE.md) says of the graphs' outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..manifest import Manifest
from . import FLOAT_TYPES

OUTPUTS = {  # in the contract's order; a graph may list them in any
    "condition": ("encoder_modulation", "decoder_modulation"),
    "encoder": ("visible_features",),
    "decoder": ("logits",),
    "sampler": ("tokens", "revealed_tokens", "revealed_positions", "masked_positions"),
    "image_decoder": ("images",),
    "image_encoder": ("tokens",),
}


def output_shapes(
    manifest: Manifest,
    graph: str,
    inputs: Mapping[str, Any],
    modulation_shapes: Callable[[], Mapping[str, tuple[int, ...]]],
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of each output in the contract's order. inputs: tensors, or anything else with shapes.

    modulation_shapes: gives those of the condition's outputs beyond the first axis; called for that graph alone.
    """
    model, float_type = manifest.model, FLOAT_TYPES[manifest.float_type]
    shape = {name: tensor.shape for name, tensor in inputs.items()}
    found: list[tuple[tuple[int, ...], Any]]
    if graph == "condition":
        modulation = modulation_shapes()
        found = [((shape["labels"][0], *modulation[name]), float_type) for name in OUTPUTS[graph]]
    elif graph == "encoder":
        rows, seen, dim = shape["features"]
        found = [((rows, seen + shape["tokens"][1], dim), float_type)]
    elif graph == "decoder":
        found = [((shape["decoder_modulation"][0], shape["positions"][1], model.codes), np.float32)]
    elif graph == "sampler":
        keep = inputs["keep"]
        assert isinstance(keep, np.ndarray)
        batch, masked = shape["positions"]
        revealed = masked - int(keep)
        found = [((batch, count), np.int64) for count in (masked, revealed, revealed, int(keep))]
    elif graph == "image_decoder":
        assert model.image_size is not None  # as the manifest's reader makes sure
        found = [((shape["tokens"][0], model.image_size, model.image_size, 3), np.uint8)]
    else:
        assert graph == "image_encoder"
        found = [((shape["images"][0], model.length), np.int64)]
    return dict(zip(OUTPUTS[graph], found, strict=True))
