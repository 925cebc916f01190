"""How far an engine is from its float32 original: along the original's trajectories, in pictures, and left to itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..calibration.products import NETWORK, find_products, int8_share, load_graphs
from ..calibration.trajectory import Trajectory, divergence, guided, record, replay, spread_labels
from ..errors import ExportError, InputError
from ..runtime.backends import Tensor
from ..runtime.manifest import Manifest
from ..runtime.pipeline import Images, Pipeline, image_seeds, in_raster
from ..runtime.progress import progress_bar
from ..runtime.schedule import Step

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """One engine against another.

    By step, along the reference's trajectories: how many positions were compared, the mean Kullback-Leibler divergence of the guided
    logits in nats, the share of positions with the same most likely token, and the relative error of the features (root of the squared
    error over the squared size). Then the image decoder's PSNR in dB on the reference's tokens (mean over the pictures' errors, and the
    worst picture), the share of equal tokens of free runs at the same seeds, the int8 share of the multiply-adds with constant weights,
    whole and by part, and sizes in bytes without the image encoder.
    """

    images: int
    seed: int
    positions: NDArray[np.int64]  # [steps]
    step_divergence: Floats  # [steps]
    step_top1: Floats  # [steps]
    step_features: Floats  # [steps]; nothing is encoded before the first
    psnr: float | None
    least_psnr: float | None
    tokens_equal: float
    share: dict[str, float]
    bytes: int
    reference_bytes: int
    pictures: tuple[Images, Images] | None  # free runs: the reference's, the engine's

    @property
    def divergence(self) -> float:
        """Mean over all positions of all steps, nats."""
        return float(np.average(self.step_divergence, weights=self.positions))

    @property
    def top1(self) -> float:
        return float(np.average(self.step_top1, weights=self.positions))

    def summary(self) -> dict[str, Any]:
        """The figures as plain numbers."""
        return {
            "images": self.images,
            "seed": self.seed,
            "divergence": self.divergence,
            "top1": self.top1,
            "features": float(self.step_features[-1]),
            "psnr": self.psnr,
            "least_psnr": self.least_psnr,
            "tokens_equal": self.tokens_equal,
            "int8_share": self.share,
            "bytes": self.bytes,
            "reference_bytes": self.reference_bytes,
            "steps": [
                {"positions": int(n), "divergence": float(d), "top1": float(t), "features": float(f)}
                for n, d, t, f in zip(self.positions, self.step_divergence, self.step_top1, self.step_features, strict=True)
            ],
        }

    def __str__(self) -> str:
        pictures = "" if self.psnr is None else f", pictures {self.psnr:.1f} dB"
        return f"divergence {self.divergence:.2g} nats, top-1 agreement {self.top1:.2%}{pictures}"


def seeds_of(images: int, seed: int) -> list[int]:
    """Of the images that are compared. Raises InputError."""
    if images < 1:
        raise InputError(f"expected 1 or more images, got {images}")
    return image_seeds(seed, images)


def compare(
    engine: Pipeline,
    reference: Pipeline,
    images: int = 64,
    seed: int = 0,
    classes: Sequence[int] | None = None,
    batch_size: int = 8,
    keep_pictures: bool = False,
    progress: bool = False,
) -> Comparison:
    """Compares an engine with another of the same model: `images` pictures over the classes, image i with seed + i. keep_pictures: give
    those of the free runs too.

    Raises InputError where they are not of the same model, ExportError where a value is not finite.
    """
    check_same_model(engine.manifest, reference.manifest)
    steps = reference.schedule()
    seeds = seeds_of(images, seed)
    labels = spread_labels(reference.manifest.model, images, classes)
    sums = np.zeros((len(steps), 5))  # positions, divergence, top-1, squared error of features, their squares
    psnr_errors, equal = [], 0.0
    pictures: list[tuple[Images, Images]] = []
    with progress_bar(images, "image", progress) as bar:
        for start in range(0, images, batch_size):
            chosen = labels[start : start + batch_size]
            (one,) = record(reference, chosen, seeds[start], batch_size)
            add_steps(sums, replayed(engine, one), replayed(reference, one))
            (own,) = record(engine, chosen, seeds[start], batch_size, steps)
            tokens, own_tokens = (in_raster(drawn.tokens, drawn.positions, reference.manifest.model.grid) for drawn in (one, own))
            equal += float((own_tokens == tokens).mean()) * len(chosen) / images
            if engine.manifest.has("image_decoder.onnx") and reference.manifest.has("image_decoder.onnx"):
                expected = reference.decode(tokens)
                error = (engine.decode(tokens).astype(np.float64) - expected) ** 2
                psnr_errors.extend(error.mean((1, 2, 3)))
                if keep_pictures:
                    pictures.append((expected, engine.decode(own_tokens)))
            bar.update(len(chosen))
    if not np.isfinite(sums).all():
        raise ExportError("the engine's features or logits are not finite")
    return Comparison(
        images=images,
        seed=seed,
        positions=sums[:, 0].astype(np.int64),
        step_divergence=sums[:, 1] / sums[:, 0],
        step_top1=sums[:, 2] / sums[:, 0],
        step_features=np.sqrt(sums[:, 3] / np.maximum(sums[:, 4], 1e-30)),
        psnr=psnr(float(np.mean(psnr_errors))) if psnr_errors else None,
        least_psnr=psnr(max(psnr_errors)) if psnr_errors else None,
        tokens_equal=equal,
        share=shares(engine, steps),
        bytes=engine_bytes(engine),
        reference_bytes=engine_bytes(reference),
        pictures=(np.concatenate([a for a, _ in pictures]), np.concatenate([b for _, b in pictures])) if pictures else None,
    )


def check_same_model(one: Manifest, other: Manifest) -> None:
    """Raises InputError where two engines were made from different checkpoints, or the second is not float32."""
    if other.precision != "fp32":
        raise InputError(f"{other.folder}: its precision is {other.precision}, expected fp32: engines are compared with float32")
    for name, found, expected in (
        *(
            (name, getattr(one.model, name), getattr(other.model, name))
            for name in ("grid", "dim", "heads", "codes", "num_classes", "encoder_depth", "decoder_depth")
        ),
        *((name, one.source.get(name), other.source.get(name)) for name in ("checkpoint_sha256", "tokenizer_sha256")),
    ):
        if found != expected:
            raise InputError(f"{one.folder} and {other.folder} are engines of different models: {name} is {found} and {expected}")


Recorded = list[tuple[NDArray[Any], NDArray[Any]]]  # every step's guided logits, and features of the visible tokens


def replayed(pipeline: Pipeline, trajectory: Trajectory) -> Recorded:
    result: Recorded = []

    def on_logits(step: Step, logits: Tensor, features: Tensor) -> None:
        result.append((guided(lane.download(logits), step, len(trajectory.labels)), lane.download(features).astype(np.float32)))

    with pipeline.backend.lease() as lane:
        replay(lane, pipeline.manifest, trajectory, on_logits)
    return result


def add_steps(sums: Floats, found: Recorded, expected: Recorded) -> None:
    for row, (logits, features), (wanted, wanted_features) in zip(sums, found, expected, strict=True):
        row[0] += wanted[..., 0].size
        row[1] += divergence(logits, wanted).sum()
        row[2] += (logits.argmax(-1) == wanted.argmax(-1)).sum()
        row[3] += ((features - wanted_features).astype(np.float64) ** 2).sum()
        row[4] += (wanted_features.astype(np.float64) ** 2).sum()


def psnr(squared_error: float) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures in dB; equal pictures count as an error of one hundredth of a level."""
    return float(10 * np.log10(255**2 / max(squared_error, 1e-4)))


def shares(pipeline: Pipeline, steps: Sequence[Step]) -> dict[str, float]:
    """The int8 share of the multiply-adds with constant weights, of the network, the image decoder, and all."""
    products = find_products(load_graphs(pipeline.manifest))
    parts = {
        "network": [product for product in products if product.graph in NETWORK],
        "image_decoder": [product for product in products if product.graph not in NETWORK],
        "all": products,
    }
    return {name: int8_share(part, steps) for name, part in parts.items() if part}


def engine_bytes(pipeline: Pipeline) -> int:
    """All files of an engine but the image encoder's."""
    return sum(entry["size"] for name, entry in pipeline.manifest.files.items() if not name.startswith("image_encoder."))
