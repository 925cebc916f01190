"""Every exported graph against PyTorch, in ONNX Runtime, at several shapes, the empty ones included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from ..calibration.trajectory import log_softmax
from ..errors import ExportError
from ..models.config import NetworkConfig
from ..models.tokenizer import Tokenizer
from ..runtime.cores import allowed_threads
from .graphs import unit_pixels

FLOAT_TOLERANCE = 1e-4  # of the largest value that PyTorch gives, or of 1
UINT8_SHARE = 1e-2  # of pixels that may be rounded the other way


@dataclass(frozen=True)
class Check:
    """One graph's worst figures over all shapes."""

    graph: str
    shapes: int
    largest_error: float  # of float outputs; of pixels the share that differs; of choices by how much they miss their rule

    def __str__(self) -> str:
        return f"{self.graph}: {self.shapes} shapes, error at most {self.largest_error:.1e}"


Inputs = dict[str, Tensor]
Outputs = dict[str, np.ndarray]
Departure = tuple[str, float, float]  # in which way, by how much, and by how much it may


def run_cases(path: Path, cases: Iterator[Inputs]) -> Iterator[tuple[Inputs, Outputs]]:
    """Every case, and what a graph makes of it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = allowed_threads() or 0
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for inputs in cases:
        yield inputs, dict(zip(names, session.run(None, {name: value.numpy() for name, value in inputs.items()}), strict=True))


def check_cases(path: Path, cases: Iterator[Inputs], departures: Callable[[Inputs, Outputs], Iterator[Departure]]) -> Check:
    """Runs a graph on every case. Raises ExportError where it departs from what it should give by more than it may."""
    worst, count = 0.0, 0
    for inputs, found in run_cases(path, cases):
        for how, error, limit in departures(inputs, found):
            if not error <= limit:
                shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items() if value.dim())
                raise ExportError(f"{path.name}: {how} by {error:.2e}, expected at most {limit:.0e} ({shapes})")
            worst = max(worst, error)
        count += 1
    return Check(path.stem, count, worst)


def check_graph(path: Path, reference: Callable[..., Tensor | Sequence[Tensor]], cases: Iterator[Inputs]) -> Check:
    """Runs a graph and its reference on every case. Raises ExportError where they differ by more than rounding."""

    def departures(inputs: Inputs, found: Outputs) -> Iterator[Departure]:
        with torch.inference_mode():
            expected = reference(**inputs)
        for (name, value), wanted in zip(found.items(), [expected] if isinstance(expected, Tensor) else expected, strict=True):
            yield f"{name} differs from PyTorch", *difference(value, wanted.numpy())

    return check_cases(path, cases, departures)


def check_sampler(path: Path, cases: Iterator[Inputs]) -> Check:
    """Runs the sampler on every case. Raises ExportError where it chooses what its rule does not allow, but for rounding.

    Not by equality: one choice that is rounded the other way moves all that is ordered by confidence behind it.
    """

    def departures(inputs: Inputs, found: Outputs) -> Iterator[Departure]:
        yield "departs from its rule", sampler_error({name: value.numpy() for name, value in inputs.items()}, found), FLOAT_TOLERANCE

    return check_cases(path, cases, departures)


def check_image_encoder(path: Path, tokenizer: Tokenizer, cases: Iterator[Inputs]) -> Check:
    """Runs the image encoder on every case. Raises ExportError where it chooses codes that are not the nearest, but for rounding: two may
    be equally near.
    """

    def departures(inputs: Inputs, found: Outputs) -> Iterator[Departure]:
        with torch.inference_mode():
            distances = tokenizer.quantize.distances(tokenizer.encoder(unit_pixels(inputs["images"]))).numpy()
        yield "departs from the nearest codes", nearest_error(distances, found["tokens"]), FLOAT_TOLERANCE

    return check_cases(path, cases, departures)


def nearest_error(distances: np.ndarray, tokens: np.ndarray) -> float:
    """By how much tokens [B, L] are farther than the nearest codes by distances [B, L, K], as a share of all that these differ by."""
    if tokens.shape != distances.shape[:2] or tokens.dtype != np.int64 or tokens.min() < 0 or tokens.max() >= distances.shape[2]:
        return np.inf
    chosen, nearest = np.take_along_axis(distances, tokens[..., None], 2)[..., 0], distances.min(-1)
    farther = float((chosen - nearest).max())
    return farther / float(distances.max() - distances.min()) if farther else 0.0


def sampler_error(inputs: dict[str, np.ndarray], found: Outputs) -> float:
    """By how much the sampler's outputs miss docs/ENGINE.md's rule, computed in float64: the probability that lies between the noise and
    what a token stands for, or the confidence that a token which is revealed lacks. Infinite where tokens and positions do not fit
    together.
    """
    positions, keep = inputs["positions"], int(inputs["keep"])
    batch, masked = positions.shape
    tokens, masked_positions = found["tokens"], found["masked_positions"]
    revealed_tokens, revealed_positions = found["revealed_tokens"], found["revealed_positions"]
    shapes = (tokens.shape, masked_positions.shape, revealed_tokens.shape, revealed_positions.shape)
    if shapes != ((batch, masked), (batch, keep), *2 * ((batch, masked - keep),)) or {one.dtype.str for one in found.values()} != {"<i8"}:
        return np.inf
    logits = inputs["logits"].astype(np.float64)
    conditional, unconditional = logits[:batch], logits[len(logits) - batch :]
    logp = log_softmax(conditional + float(inputs["guidance"]) * (conditional - unconditional))
    if tokens.min() < 0 or tokens.max() >= logp.shape[2]:
        return np.inf
    upper = np.exp(log_softmax(logp / float(inputs["sampling_temperature"]))).cumsum(-1)
    lower = np.concatenate((np.zeros_like(upper[..., :1]), upper[..., :-1]), -1)
    noise = np.take_along_axis(inputs["choice_noise"].astype(np.float64), positions, 1)

    def of_tokens(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, tokens[..., None], 2)[..., 0]

    error = float(np.maximum(of_tokens(lower) - noise, noise - of_tokens(upper)).max(initial=0))
    confidence = of_tokens(logp) + float(inputs["mask_temperature"]) * np.take_along_axis(inputs["confidence_noise"], positions, 1)
    for row in range(batch):
        place = {int(position): i for i, position in enumerate(positions[row])}
        where = [place.get(int(position), -1) for position in (*revealed_positions[row], *masked_positions[row])]
        if sorted(where) != list(range(masked)) or not np.array_equal(tokens[row][where[: masked - keep]], revealed_tokens[row]):
            return np.inf
        if 0 < keep < masked:
            lacks = confidence[row][where[masked - keep :]].max() - confidence[row][where[: masked - keep]].min()
            error = max(error, float(lacks) / max(1.0, float(np.abs(confidence[row]).max())))
    return error


def difference(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """How far two outputs are apart, and how far they may be."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise ExportError(f"expected {wanted.dtype} {list(wanted.shape)}, the graph gives {found.dtype} {list(found.shape)}")
    if not wanted.size:
        return 0.0, 0.0
    if np.issubdtype(wanted.dtype, np.floating):
        scale = max(1.0, float(np.abs(wanted).max()))
        return float(np.abs(found - wanted).max()) / scale, FLOAT_TOLERANCE
    apart = np.abs(found.astype(np.int64) - wanted.astype(np.int64))
    return (1.0 if apart.max() > 1 else float((apart > 0).mean())), UINT8_SHARE


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_positions(batch: int, count: int, length: int, rng: torch.Generator) -> Tensor:
    return torch.rand(batch, length, generator=rng).argsort(1)[:, :count]


def condition_cases(config: NetworkConfig) -> Iterator[Inputs]:
    yield {"labels": torch.tensor([config.null_class])}
    yield {"labels": torch.arange(min(config.num_classes + 1, 5))}


Modulation = Callable[[Tensor], tuple[Tensor, Tensor]]  # labels → the encoder's and the decoder's


def encoder_inputs(
    config: NetworkConfig, modulation: Modulation, rng: torch.Generator, batch: int, rows: int, new: int, seen: int
) -> Inputs:
    labels = torch.randint(config.num_classes + 1, (rows,), generator=rng)
    return {
        "tokens": torch.randint(config.codes, (batch, new), generator=rng),
        "positions": random_positions(batch, new, config.length, rng),
        "features": torch.randn(rows, seen, config.dim, generator=rng),
        "encoder_modulation": modulation(labels)[0],
    }


def encoder_cases(config: NetworkConfig, modulation: Modulation) -> Iterator[Inputs]:
    """From all ends of the ranges of (batch, rows, new, seen)."""
    rng, length = generator(), config.length
    for sizes in ((1, 2, 3, 0), (1, 1, 1, 1), (2, 4, length // 4, length // 2), (2, 2, 0, 3), (1, 2, 0, 0), (3, 6, 2, length - 2)):
        yield encoder_inputs(config, modulation, rng, *sizes)


def decoder_inputs(
    config: NetworkConfig, modulation: Modulation, rng: torch.Generator, batch: int, rows: int, masked: int, visible: int
) -> Inputs:
    labels = torch.randint(config.num_classes + 1, (rows,), generator=rng)
    return {
        "positions": random_positions(batch, masked, config.length, rng),
        "features": torch.randn(rows, visible, config.dim, generator=rng),
        "decoder_modulation": modulation(labels)[1],
    }


def decoder_cases(config: NetworkConfig, modulation: Modulation) -> Iterator[Inputs]:
    """From all ends of the ranges of (batch, rows, masked, visible)."""
    rng, length = generator(), config.length
    for sizes in ((1, 1, length, 0), (2, 2, length, 0), (1, 2, length - 3, 3), (2, 4, length // 2, length // 2), (3, 6, 1, length - 1)):
        yield decoder_inputs(config, modulation, rng, *sizes)


def sampler_cases(config: NetworkConfig) -> Iterator[Inputs]:
    """(batch, rows, masked, keep) from all ends of their ranges."""
    rng, length = generator(), config.length
    for batch, rows, masked, keep in (
        (1, 1, length, length - 2),
        (2, 4, length // 2, length // 3),
        (2, 2, 3, 0),
        (1, 2, 1, 1),
        (3, 6, 2, 1),
    ):
        yield {
            "logits": 3 * torch.randn(rows, masked, config.codes, generator=rng),
            "positions": random_positions(batch, masked, length, rng),
            "choice_noise": torch.rand(batch, length, generator=rng),
            "confidence_noise": torch.randn(batch, length, generator=rng),
            "guidance": torch.tensor(1.5),
            "sampling_temperature": torch.tensor(2.0),
            "mask_temperature": torch.tensor(0.7),
            "keep": torch.tensor(keep),
        }


def image_decoder_cases(codes: int, length: int, batches: Sequence[int] = (1, 2)) -> Iterator[Inputs]:
    rng = generator()
    for batch in batches:
        yield {"tokens": torch.randint(codes, (batch, length), generator=rng), "positions": random_positions(batch, length, length, rng)}


def image_encoder_cases(image_size: int, batches: Sequence[int] = (1, 2)) -> Iterator[Inputs]:
    rng = generator()
    for batch in batches:
        yield {"images": torch.randint(256, (batch, image_size, image_size, 3), dtype=torch.uint8, generator=rng)}
