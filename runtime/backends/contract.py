"""What the engine contract (docs/ENGINE.md) says of the graphs' outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..manifest import Manifest
from . import FLOAT_TYPES


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
    if graph == "condition":
        modulation = modulation_shapes()
        return {name: ((shape["labels"][0], *modulation[name]), float_type) for name in ("encoder_modulation", "decoder_modulation")}
    if graph == "encoder":
        rows, seen, dim = shape["features"]
        return {"visible_features": ((rows, seen + shape["tokens"][1], dim), float_type)}
    if graph == "decoder":
        return {"logits": ((shape["decoder_modulation"][0], shape["positions"][1], model.codes), np.float32)}
    if graph == "sampler":
        keep = inputs["keep"]
        assert isinstance(keep, np.ndarray)
        batch, masked = shape["positions"]
        revealed = (batch, masked - int(keep))
        names = ("tokens", "revealed_tokens", "revealed_positions", "masked_positions")
        return {name: (found, np.int64) for name, found in zip(names, ((batch, masked), revealed, revealed, (batch, int(keep))))}
    if graph == "image_decoder":
        assert model.image_size is not None  # as the manifest's reader makes sure
        return {"images": ((shape["tokens"][0], model.image_size, model.image_size, 3), np.uint8)}
    assert graph == "image_encoder"
    return {"tokens": ((shape["images"][0], model.length), np.int64)}
