"""The reference implementation's results, by the models and by the exported graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Golden

from enat.benchmarks.reference import Branch, run_network
from enat.export.graphs import ImageEncoderGraph
from enat.models.checkpoint import load_network, load_tokenizer
from enat.models.config import NetworkConfig
from enat.models.network import Network, normalize
from enat.models.tokenizer import to_uint8
from enat.runtime.backends import Lane, open_backend
from enat.runtime.manifest import read_manifest
from enat.runtime.schedule import Step, schedule

TOLERANCE = 1e-4


def steps_of(golden: Golden) -> list[Step]:
    case = golden.case
    return schedule(case["grid"] ** 2, case["steps"], case["cfg_scale"], case["mask_temp"], case["samp_temp"])


def trajectory(golden: Golden) -> Iterator[tuple[Step, dict[str, np.ndarray]]]:
    """Step by step: which positions were revealed by the step before and which are masked, and what the reference computed there."""
    run = golden.load("trajectory")
    mask, batch = golden.case["codebook_size"], len(run["labels"])
    before = np.full_like(run["ids"][0], mask)
    for step, ids in zip(steps_of(golden), run["ids"], strict=True):
        positions = np.nonzero(ids == mask)[1].reshape(batch, -1)
        new = np.nonzero((ids != mask) & (before == mask))[1].reshape(batch, -1)

        def at(values: np.ndarray, where: np.ndarray = positions) -> np.ndarray:
            return np.take_along_axis(values, where.reshape(*where.shape, *[1] * (values.ndim - 2)), axis=1)

        yield (
            step,
            {
                "positions": positions,
                "new": new,
                "tokens": at(ids, new),
                "logits": np.concatenate((at(run["cond_logits"][step.index]), at(run["uncond_logits"][step.index]))),
                "sampled": at(run["sampled"][step.index]),
                "gumbel": run["gumbel"][step.index],
                "labels": run["labels"],
            },
        )
        before = ids


def test_network(golden: Golden) -> None:
    network = load_network(golden.ckpt, **golden.split)
    features = None
    with torch.inference_mode():
        for step, wanted in trajectory(golden):
            labels = torch.from_numpy(np.concatenate((wanted["labels"], np.full_like(wanted["labels"], network.config.null_class))))
            encoder_modulation, decoder_modulation = network.modulation(labels)
            if step.index:
                new = network.x_embedder(torch.from_numpy(wanted["tokens"]), torch.from_numpy(wanted["new"])).repeat(2, 1, 1)
                features = network.encode(new, features, encoder_modulation)
            masked = network.embed_masked(torch.from_numpy(wanted["positions"])).repeat(2, 1, 1)
            logits = network.decode(masked, features, decoder_modulation)
            assert logits.shape[1] == step.masked
            np.testing.assert_allclose(logits, wanted["logits"], atol=TOLERANCE, rtol=0)


def test_what_norms_add_to_variances() -> None:
    """As published: too little to be seen in results of common size."""
    one = Network(NetworkConfig(2, 8, 1, 1, 1, 4, 3))
    assert (one.x_embedder.LayerNorm.eps, one.prev_proj.norm.eps) == (1e-6, 1e-6)
    assert (one.norm.eps, one.mlm_layer.ln.eps) == (1e-5, 1e-5)
    assert torch.allclose(normalize(torch.tensor([-1e-3, 1e-3])), torch.tensor([-1.0, 1.0]) * 0.5**0.5)


def test_benchmark_reference(golden: Golden) -> None:
    """What speed is compared with computes what the published code does: the logits of all positions, on both branches."""
    network = load_network(golden.ckpt, **golden.split)
    run = golden.load("trajectory")
    labels = torch.from_numpy(run["labels"])
    branches = {"cond_logits": labels, "uncond_logits": torch.full_like(labels, network.config.null_class)}
    previous: dict[str, Branch | None] = dict.fromkeys(branches)
    with torch.inference_mode():
        for step, _ in trajectory(golden):
            for name, branch_labels in branches.items():
                ids = torch.from_numpy(run["ids"][step.index])
                logits, previous[name] = run_network(network, ids, branch_labels, previous[name])
                np.testing.assert_allclose(logits, run[name][step.index], atol=TOLERANCE, rtol=0)


def test_tokenizer(golden: Golden) -> None:
    tokenizer = load_tokenizer(golden.vqgan)
    case = golden.load("vqgan")
    with torch.inference_mode():
        decoded = tokenizer.decode(torch.from_numpy(case["tokens"]).flatten(1))
        encoded = tokenizer.encode(torch.from_numpy(case["image"]))
    np.testing.assert_allclose(decoded, case["decoded"], atol=TOLERANCE, rtol=0)
    assert np.array_equal(encoded.reshape(case["encoded"].shape), case["encoded"])


def test_pixels_are_the_nearest_levels() -> None:
    """From 0 to 1 and 0 to 255, out and in."""
    values = torch.tensor([-0.2, 0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0, 1.3])
    assert to_uint8(values.repeat(1, 3, 1, 1))[0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255, 255]

    class Given(torch.nn.Module):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return images

    levels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    found = ImageEncoderGraph(Given())(levels.repeat(1, 1, 3, 1).mT)  # type: ignore[arg-type]
    assert torch.allclose(found, torch.tensor([0, 0.2, 1]).repeat(1, 3, 1, 1))


@pytest.fixture
def lane(golden: Golden, engines: Callable[[str], Path]) -> Iterator[Lane]:
    with open_backend("auto", read_manifest(engines(golden.folder.name))).lease() as lane:
        yield lane


def test_engine(golden: Golden, lane: Lane) -> None:
    """The graphs along the reference's run, both branches at once; the sampler with noise that leads to the reference's choices."""
    batch, length = len(golden.load("trajectory")["labels"]), golden.case["grid"] ** 2
    features = np.zeros((2 * batch, 0, golden.case["dim"]), np.float32)
    revealed = None
    for step, wanted in trajectory(golden):
        null = np.full_like(wanted["labels"], golden.case["num_classes"])
        encoder_modulation, decoder_modulation = lane.run("condition", {"labels": np.concatenate((wanted["labels"], null))})
        if revealed is not None:
            tokens, positions = revealed
            assert np.array_equal(np.sort(positions), wanted["new"])
            assert np.array_equal(np.take_along_axis(tokens, positions.argsort(1), 1), wanted["tokens"])
            inputs = {"tokens": tokens, "positions": positions, "features": features, "encoder_modulation": encoder_modulation}
            (features,) = lane.run("encoder", inputs)
        inputs = {"positions": wanted["positions"], "features": features, "decoder_modulation": decoder_modulation}
        (logits,) = lane.run("decoder", inputs)
        np.testing.assert_allclose(logits, wanted["logits"], atol=TOLERANCE, rtol=0)

        choice = np.zeros((batch, length), np.float32)
        np.put_along_axis(choice, wanted["positions"], noise_for(logits, wanted["sampled"], step), axis=1)
        tokens, *revealed, _ = lane.run(
            "sampler",
            {
                "logits": logits,
                "positions": wanted["positions"],
                "choice_noise": choice,
                "confidence_noise": wanted["gumbel"],
                "guidance": np.array(step.guidance, np.float32),
                "sampling_temperature": np.array(step.sampling_temperature, np.float32),
                "mask_temperature": np.array(step.mask_temperature, np.float32),
                "keep": np.array(step.keep),
            },
        )
        assert np.array_equal(tokens, wanted["sampled"])


def noise_for(logits: np.ndarray, tokens: np.ndarray, step: Step) -> np.ndarray:
    """The middle of each token's interval of the cumulative sum."""
    conditional, unconditional = np.split(logits.astype(np.float64), 2)
    guided = (conditional + step.guidance * (conditional - unconditional)) / step.sampling_temperature
    probability = np.exp(guided - guided.max(-1, keepdims=True))
    probability /= probability.sum(-1, keepdims=True)
    cumulative = np.take_along_axis(probability.cumsum(-1), tokens[..., None], -1)
    return (cumulative - np.take_along_axis(probability, tokens[..., None], -1) / 2)[..., 0].astype(np.float32)
