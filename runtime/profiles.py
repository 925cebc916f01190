"""TensorRT optimization profiles from the sampling schedule: which shapes each graph meets, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from ..errors import InputError
from .builds import Profile, Shape
from .manifest import Manifest, ModelInfo
from .schedule import schedule

TOPK_LIMIT = 3840  # the most that TensorRT's top-k sorts

Range = tuple[int, int, int]  # least, best, most


def graph_profiles(
    manifest: Manifest, steps: Sequence[int], batches: Sequence[Range], modulation: Mapping[str, Shape], image_encoder: bool = True
) -> dict[str, list[Profile]]:
    """Profiles for every graph of an engine: one for each step of runs of `steps` steps, with its exact token counts; then one for
    anything else, empty dimensions included.

    batches: ranges of images at once, the smallest first; each has profiles of its own. modulation: shapes of the condition's outputs
    beyond their first axis. Rows are twice the batch under guidance, at best and at most; at least as many as the batch, which is what
    runs without guidance have.
    Raises InputError for a number of steps out of its range, or more tokens than TensorRT can sort.
    """
    model = manifest.model
    if model.length > TOPK_LIMIT:
        raise InputError(f"{manifest.folder}: {model.length} tokens an image; TensorRT sorts at most {TOPK_LIMIT} values")
    for least, best, most in batches:
        if not 1 <= least <= best <= most:
            raise InputError(f"expected batches of 1 ≤ least ≤ best ≤ most, got {least}, {best}, {most}")
    length = model.length
    encoder, decoder, sampler = [], [], []
    for number in steps:
        for batch, step in itertools.product(batches, schedule(length, number, 1.0, 1.0, 1.0)):
            rows = guided(batch) if step.index else batch
            if step.index:
                encoder.append(encoder_profile(model, batch, rows, count(step.new), count(step.seen), modulation))
            decoder.append(decoder_profile(model, batch, rows, count(step.masked), count(step.visible), modulation))
            sampler.append(sampler_profile(model, batch, rows, count(step.masked), count(step.keep)))
    batch = batches[0][0], batches[0][1], batches[-1][2]
    network = {"encoder": encoder, "decoder": decoder, "sampler": sampler}
    result = {"condition": [general_profile(manifest, "condition", one) for one in batches]}
    for graph, own in network.items():
        result[graph] = unique([*own, general_profile(manifest, graph, batch, modulation)])
    for graph in ("image_decoder", *(["image_encoder"] if image_encoder else [])):
        if manifest.has(f"{graph}.onnx"):
            result[graph] = [general_profile(manifest, graph, one) for one in batches]
    return result


def general_profile(manifest: Manifest, graph: str, batch: Range, modulation: Mapping[str, Shape] | None = None) -> Profile:
    """A profile for whatever a graph is asked, empty dimensions included. modulation: for encoder and decoder, as in `graph_profiles`."""
    model, rows = manifest.model, guided(batch)
    length, half = model.length, max(1, model.length // 2)
    anything, something = (0, half, length), (1, half, length)  # masked is never 0: a run ends there
    match graph:
        case "condition":
            return profile(labels=[rows])
        case "encoder":
            return encoder_profile(model, batch, rows, (0, max(1, length // 8), length), anything, modulation or {})
        case "decoder":
            return decoder_profile(model, batch, rows, something, anything, modulation or {})
        case "sampler":
            return sampler_profile(model, batch, rows, something, (0, length // 4, length))
        case "image_decoder":
            return profile(tokens=[batch, exactly(length)], positions=[batch, exactly(length)])
    assert model.image_size is not None
    return profile(images=[batch, exactly(model.image_size), exactly(model.image_size), exactly(3)])


def encoder_profile(model: ModelInfo, batch: Range, rows: Range, new: Range, seen: Range, modulation: Mapping[str, Shape]) -> Profile:
    return profile(
        tokens=[batch, new],
        positions=[batch, new],
        features=[rows, seen, exactly(model.dim)],
        encoder_modulation=[rows, *map(exactly, modulation["encoder_modulation"])],
    )


def decoder_profile(model: ModelInfo, batch: Range, rows: Range, masked: Range, visible: Range, modulation: Mapping[str, Shape]) -> Profile:
    return profile(
        positions=[batch, masked],
        features=[rows, visible, exactly(model.dim)],
        decoder_modulation=[rows, *map(exactly, modulation["decoder_modulation"])],
    )


def sampler_profile(model: ModelInfo, batch: Range, rows: Range, masked: Range, keep: Range) -> Profile:
    noise = [batch, exactly(model.length)]
    return profile(
        logits=[rows, masked, exactly(model.codes)],
        positions=[batch, masked],
        choice_noise=noise,
        confidence_noise=noise,
        keep=[keep],  # sets shapes, so that TensorRT wants its values
    )


def guided(batch: Range) -> Range:
    """Rows for a batch, with guidance and without."""
    least, best, most = batch
    return least, 2 * best, 2 * most


def exactly(size: int) -> Range:
    return size, size, size


def count(tokens: int) -> Range:
    """Exactly so many tokens; none is tuned for one, as a size that is 0 throughout a profile may be more than the builder can time."""
    return exactly(tokens) if tokens else (0, 1, 1)


def profile(**inputs: Sequence[Range]) -> Profile:
    """Inputs' axes, each (least, best, most) → inputs' shapes at their least, best and most."""
    return {name: (tuple(a[0] for a in axes), tuple(a[1] for a in axes), tuple(a[2] for a in axes)) for name, axes in inputs.items()}


def unique(profiles: Sequence[Profile]) -> list[Profile]:
    """Without repetitions, in order: runs of different lengths may share steps."""
    return [one for i, one in enumerate(profiles) if one not in profiles[:i]]
