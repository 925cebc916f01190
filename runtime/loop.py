"""The sampling loop: which graph runs when, on what. It reads no tensor, so everything between labels and pictures may stay on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .backends import FLOAT_TYPES, Backend, Tensor
from .manifest import Manifest
from .noise import step_noise
from .schedule import Step

# (step, tokens, positions, masked_positions): every token as chosen so far, at its position, and which positions stay masked
OnStep = Callable[[Step, Tensor, Tensor, Tensor], None]

# (step, logits, positions, features) → tokens at the positions, the revealed ones' tokens and positions, the positions that stay masked
Choose = Callable[[Step, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


def sample(
    backend: Backend, manifest: Manifest, labels: Sequence[int], seeds: Sequence[int], steps: Sequence[Step], on_step: OnStep | None = None
) -> tuple[Tensor, Tensor]:
    """Draws one batch.

    labels, seeds: one an image; steps: from `schedule`. Returns the backend's (tokens, positions) [batch, length], in the order in
    which they were revealed. `on_step` is called after every step, with the revealed tokens and the step's choice for all others.
    """
    noise = [tuple(map(backend.upload, step_noise(seeds, step.index, manifest.model.length))) for step in steps]

    def choose(step: Step, logits: Tensor, positions: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        choice_noise, confidence_noise = noise[step.index]
        tokens, revealed_tokens, revealed_positions, masked_positions = backend.run(
            "sampler",
            {
                "logits": logits,
                "positions": positions,
                "choice_noise": choice_noise,
                "confidence_noise": confidence_noise,
                "guidance": backend.upload(np.array(step.guidance, np.float32)),
                "sampling_temperature": backend.upload(np.array(step.sampling_temperature, np.float32)),
                "mask_temperature": backend.upload(np.array(step.mask_temperature, np.float32)),
                "keep": backend.upload(np.array(step.keep, np.int64)),
            },
        )
        return tokens, revealed_tokens, revealed_positions, masked_positions

    return unroll(backend, manifest, labels, steps, choose, on_step)


def unroll(
    backend: Backend, manifest: Manifest, labels: Sequence[int], steps: Sequence[Step], choose: Choose, on_step: OnStep | None = None
) -> tuple[Tensor, Tensor]:
    """The network over all steps, whoever chooses the tokens. Returns (tokens, positions) in the order in which they were revealed."""
    model, batch = manifest.model, len(labels)
    guided = any(step.guidance > 0 for step in steps)
    rows = 2 * batch if guided else batch
    row_labels = np.array([*labels, *[model.num_classes] * (rows - batch)], np.int64)
    encoder_modulation, decoder_modulation = backend.run("condition", {"labels": backend.upload(row_labels)})
    # Step 0 has no guidance, so it needs no unconditional rows.
    features = backend.upload(np.zeros((batch, 0, model.dim), FLOAT_TYPES[manifest.float_type]))
    modulation = backend.first_rows(decoder_modulation, batch)
    positions = backend.upload(np.tile(np.arange(model.length, dtype=np.int64), (batch, 1)))
    revealed_tokens: list[Tensor] = []
    revealed_positions: list[Tensor] = []
    for step in steps:
        if step.index > 0:
            if step.index == 1:
                features = backend.upload(np.zeros((rows, 0, model.dim), FLOAT_TYPES[manifest.float_type]))
                modulation = decoder_modulation
            (features,) = backend.run(
                "encoder",
                {
                    "tokens": revealed_tokens[-1],
                    "positions": revealed_positions[-1],
                    "features": features,
                    "encoder_modulation": encoder_modulation,
                },
            )
        (logits,) = backend.run("decoder", {"positions": positions, "features": features, "decoder_modulation": modulation})
        tokens, step_tokens, step_positions, still_masked = choose(step, logits, positions, features)
        if on_step:
            all_tokens = backend.concatenate([*revealed_tokens, tokens])
            on_step(step, all_tokens, backend.concatenate([*revealed_positions, positions]), still_masked)
        revealed_tokens.append(step_tokens)
        revealed_positions.append(step_positions)
        positions = still_masked
    return backend.concatenate(revealed_tokens), backend.concatenate(revealed_positions)
