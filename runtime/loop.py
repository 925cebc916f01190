"""The sampling loop: which graph runs when, on what. It reads no tensor, so everything between labels and pictures may stay on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import FLOAT_TYPES, Lane, Tensor
from .manifest import Manifest
from .noise import noise
from .schedule import Step

Array = NDArray[Any]

# (step, tokens, positions, masked_positions): every token as chosen so far, at its position, and which positions stay masked
OnStep = Callable[[Step, Tensor, Tensor, Tensor], None]

# (step, logits, positions, features) → tokens at the positions, the revealed ones' tokens and positions, the positions that stay masked
Choose = Callable[[Step, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]

STEP_NUMBERS = ("guidance", "sampling_temperature", "mask_temperature")


def sample(
    lane: Lane,
    manifest: Manifest,
    labels: Sequence[int],
    seeds: Sequence[int],
    steps: Sequence[Step],
    images: bool = False,
    on_step: OnStep | None = None,
) -> list[Array]:
    """Draws one batch.

    labels, seeds: one an image; steps: from `schedule`. Returns [tokens, positions], int64 [batch, length] each, in the order in which
    they were revealed; or with `images` [pictures], uint8 [batch, height, width, 3]. `on_step` is called after every step, with the
    revealed tokens and the step's choice for all others.
    """
    arrays = initial_inputs(manifest, labels, steps)
    for step, choice, confidence in zip(steps, *noise(seeds, [step.index for step in steps], manifest.model.length), strict=True):
        arrays |= {f"choice_noise {step.index}": choice, f"confidence_noise {step.index}": confidence}
        arrays |= {f"{name} {step.index}": np.array(getattr(step, name), np.float32) for name in STEP_NUMBERS}

    def program(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        def choose(step: Step, logits: Tensor, positions: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            own = {name: inputs[f"{name} {step.index}"] for name in ("choice_noise", "confidence_noise", *STEP_NUMBERS)}
            keep = np.array(step.keep, np.int64)
            chosen = lane.run("sampler", {"logits": logits, "positions": positions, **own, "keep": keep})
            tokens, revealed_tokens, revealed_positions, masked_positions = chosen
            return tokens, revealed_tokens, revealed_positions, masked_positions

        tokens, positions = unroll(lane, inputs, len(labels), steps, choose, on_step)
        return lane.run("image_decoder", {"tokens": tokens, "positions": positions}) if images else [tokens, positions]

    # What the program launches follows from these numbers, and not from labels, seeds, guidance or temperatures.
    shape = (images, len(labels), len(arrays["labels"]), tuple((step.new, step.masked, step.keep) for step in steps))
    return lane.compute(None if on_step else shape, arrays, program)


def initial_inputs(manifest: Manifest, labels: Sequence[int], steps: Sequence[Step]) -> dict[str, Array]:
    """What the network begins with. Step 0 has no guidance, so it needs no unconditional rows: its features have `batch` rows."""
    model, batch = manifest.model, len(labels)
    rows = 2 * batch if any(step.guidance > 0 for step in steps) else batch
    float_type = FLOAT_TYPES[manifest.float_type]
    return {
        "labels": np.array([*labels, *[model.num_classes] * (rows - batch)], np.int64),
        "positions": np.tile(np.arange(model.length, dtype=np.int64), (batch, 1)),
        "first_features": np.zeros((batch, 0, model.dim), float_type),
        "features": np.zeros((rows, 0, model.dim), float_type),
    }


def unroll(
    lane: Lane, inputs: Mapping[str, Tensor], batch: int, steps: Sequence[Step], choose: Choose, on_step: OnStep | None = None
) -> tuple[Tensor, Tensor]:
    """The network over all steps, whoever chooses the tokens. `inputs`: what `initial_inputs` gives, uploaded.

    Returns (tokens, positions) in the order in which they were revealed.
    """
    encoder_modulation, decoder_modulation = lane.run("condition", {"labels": inputs["labels"]})
    features, modulation = inputs["first_features"], lane.first_rows(decoder_modulation, batch)
    positions = inputs["positions"]
    revealed_tokens: list[Tensor] = []
    revealed_positions: list[Tensor] = []
    for step in steps:
        if step.index > 0:
            if step.index == 1:
                features, modulation = inputs["features"], decoder_modulation
            (features,) = lane.run(
                "encoder",
                {
                    "tokens": revealed_tokens[-1],
                    "positions": revealed_positions[-1],
                    "features": features,
                    "encoder_modulation": encoder_modulation,
                },
            )
        (logits,) = lane.run("decoder", {"positions": positions, "features": features, "decoder_modulation": modulation})
        tokens, step_tokens, step_positions, still_masked = choose(step, logits, positions, features)
        if on_step and not lane.dry:
            all_tokens = lane.concatenate([*revealed_tokens, tokens])
            on_step(step, all_tokens, lane.concatenate([*revealed_positions, positions]), still_masked)
        revealed_tokens.append(step_tokens)
        revealed_positions.append(step_positions)
        positions = still_masked
    return lane.concatenate(revealed_tokens), lane.concatenate(revealed_positions)
