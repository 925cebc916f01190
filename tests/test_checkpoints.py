"""Checkpoints in: what is read of them, as published and as trainings write them, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, Golden, refused
from test_export import SPLIT, TINY, export

from enat.errors import CheckpointError
from enat.models.checkpoint import UNUSED, load_network, load_tokenizer, network_config, read_state_dict
from enat.models.network import Network
from enat.models.presets import PRESETS, preset_class_names


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile-was-here",)


def damaged(tmp_path: Path, kind: str) -> tuple[Path, str]:
    path = tmp_path / "net.pth"
    state = read_state_dict(TINY.ckpt)
    match kind:
        case "missing":
            return path, "no such checkpoint"
        case "truncated":
            path.write_bytes(TINY.ckpt.read_bytes()[:100_000])
            return path, "truncated"
        case "damaged":
            data = bytearray(TINY.ckpt.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
            return path, "the file is damaged"
        case "a counter among them":
            torch.save({**state, "step": torch.tensor(3)}, path)
            return path, "1 unknown (step)"
        case "one position":
            torch.save({**state, "x_embedder.position_embeddings.weight": torch.zeros(1, 48)}, path)
            return path, "expected 4 positions or more, found 1"
        case "no square":
            torch.save({**state, "x_embedder.position_embeddings.weight": torch.zeros(60, 48)}, path)
            return path, "expected a square number of positions, found 60"
        case "no class":
            torch.save({**state, "y_embedder.embedding_table.weight": torch.zeros(1, 48)}, path)
            return path, "expected 2 rows of classes or more, found 1"
        case "no blocks":
            torch.save(
                {key: value for key, value in state.items() if "blocks." not in key} | {f"blocks.{'9' * 5000}.x": torch.ones(1)}, path
            )
            return path, "expected 2 blocks or more, found 0"
        case "empty":
            path.write_bytes(b"")
            return path, "not"
        case "hostile":
            path.write_bytes(pickle.dumps({"x": Hostile()}))
            return path, "could run code"
        case "hostile zip":
            torch.save({"x": Hostile()}, path)
            return path, "could run code"
        case "a folder":
            (path / "other").mkdir(parents=True)
            (path / "nnet_ema.pth").write_bytes(b"")
            return path, "is a folder; expected a checkpoint, one of nnet_ema.pth"
        case "two networks":
            torch.save({"model": state, "ema": state, "step": 3}, path)
            return path, "holds several state dicts (model, ema)"
        case "an average inside what keeps it":
            torch.save({"model": state, "ema": {"decay": 0.999, "module": state}}, path)
            return path, "holds several state dicts (model, ema.module)"
        case "something else among them":
            torch.save({**state, "step": 3}, path)
            return path, "found a dict whose 'step' is a int"
        case "whole numbers":
            torch.save({**state, "norm.weight": torch.ones(48, dtype=torch.int8)}, path)
            return path, "norm.weight has values of type int8, strided; expected floating-point numbers"
        case "complex numbers":
            torch.save({**state, "norm.weight": torch.ones(48, dtype=torch.complex64)}, path)
            return path, "norm.weight has values of type complex64"
        case "sparse":
            torch.save({**state, "norm.weight": torch.ones(48).to_sparse()}, path)
            return path, "norm.weight has values of type float32, sparse_coo"
        case "no values":
            torch.save({**state, "norm.weight": torch.empty(48, device="meta")}, path)
            return path, "norm.weight has no values; expected floating-point numbers"
        case "too large":
            torch.save({**state, "norm.weight": torch.full((48,), 1e300, dtype=torch.float64)}, path)
            return path, "norm.weight holds values that are not finite in float32"
        case "another model":
            torch.save({"layer.weight": torch.zeros(3, 3)}, path)
            return path, "not an ENAT network: expected x_embedder.word_embeddings.weight"
        case "missing keys":
            torch.save({key: value for key, value in state.items() if "blocks.1.attn.q" not in key}, path)
            return path, "2 missing (blocks.1.attn.q.weight, blocks.1.attn.q.bias)"
        case "unknown keys":
            torch.save({**state, "extra": torch.zeros(1)}, path)
            return path, "1 unknown (extra)"
        case "a wrong shape":
            torch.save({**state, "norm.weight": torch.zeros(3)}, path)
            return path, "norm.weight has shape [3], expected [48]"
        case "not finite":
            torch.save({**state, "norm.weight": torch.full((48,), torch.nan)}, path)
            return path, "norm.weight holds values that are not finite"
    raise AssertionError(kind)


KINDS = (
    "missing", "truncated", "damaged", "a counter among them", "one position", "no square", "no class", "no blocks", "empty",
    "hostile", "hostile zip", "a folder", "two networks", "an average inside what keeps it", "something else among them",
    "whole numbers", "complex numbers",
    "sparse", "no values", "too large", "another model", "missing keys", "unknown keys", "a wrong shape", "not finite",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    path, message = damaged(tmp_path, kind)
    refused(export("--ckpt", path, *SPLIT, "--out", tmp_path / "engine"), str(path), message)
    assert not (tmp_path / "hostile-was-here").exists()
    assert [file.name for file in tmp_path.iterdir() if file != path] == []


@pytest.mark.parametrize(
    ("error", "told", "words"),
    [
        (PermissionError(13, "Permission denied"), CheckpointError, "cannot be read: no permission"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), MemoryError, None),
    ],
)
def test_reading_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, error: Exception, told: type[Exception], words: str | None) -> None:
    """A file that is well is not called damaged."""

    def fails(path: Path) -> bool:
        raise error

    monkeypatch.setattr("enat.models.checkpoint.is_safetensors", fails)
    with pytest.raises(told, match=words):
        read_state_dict(TINY.ckpt)


def test_sizes_are_read_off_the_shapes(golden: Golden) -> None:
    network = load_network(golden.ckpt, **golden.split)
    case = golden.case
    wanted = (case["grid"], case["dim"], case["encoder_depth"], case["decoder_depth"], case["codebook_size"], case["num_classes"])
    config = network.config
    assert (config.grid, config.dim, config.encoder_depth, config.decoder_depth, config.codes, config.num_classes) == wanted
    assert load_tokenizer(golden.vqgan).config.codes == case["codebook_size"]
    with pytest.raises(CheckpointError, match="not a VQGAN"):
        load_tokenizer(golden.ckpt)


def test_a_tokenizer_of_widths_that_its_norms_do_not_divide(tmp_path: Path) -> None:
    state, key = read_state_dict(TINY.vqgan), "encoder.down.0.block.0.conv1.weight"
    torch.save({**state, key: torch.zeros(48, *state[key].shape[1:])}, tmp_path / "vqgan.ckpt")
    with pytest.raises(CheckpointError, match=r"widths \[48, .*\], expected multiples of 32"):
        load_tokenizer(tmp_path / "vqgan.ckpt")


def test_defaults_of_heads_and_depth(tmp_path: Path) -> None:
    """The other case has width 64: one head of 64, and two blocks, of which none would be left to encode."""
    with pytest.raises(CheckpointError, match="2 blocks"):
        load_network(DATA / "odd" / "nnet_ema.pth")
    assert load_network(DATA / "odd" / "nnet_ema.pth", encoder_depth=1).config.heads == 1


def wrapped(state: dict[str, Any], how: str) -> Any:
    match how:
        case "DistributedDataParallel of torch.compile":
            return {f"module._orig_mod.{key}": value for key, value in state.items()}
        case "AveragedModel":
            return {"n_averaged": torch.tensor(3), **{f"module.{key}": value for key, value in state.items()}}
        case "Lightning":
            return {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 3, "optimizer_states": [{"a": 1}]}
        case "beside what is no network":
            optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 2)}}, "param_groups": []}
            return {"optimizer": optimizer, "rng": {"cpu": torch.get_rng_state()}, "nnet": {"weights": state}}
        case "positions in a buffer":
            return {f"module.{key}": value for key, value in {**state, "x_embedder.position_ids": torch.arange(16)[None]}.items()}
        case "half precision":
            return {key: value.bfloat16() for key, value in state.items()}
        case "float8":
            return {**state, "norm.bias": state["norm.bias"].to(torch.float8_e4m3fn)}
    raise AssertionError(how)


def test_a_tokenizer_with_what_its_training_used(tmp_path: Path) -> None:
    """A discriminator's counters are no floats, and no part of the tokenizer."""
    expected = load_tokenizer(TINY.vqgan).state_dict()
    for prefix in ("", "model."):
        state = {f"{prefix}{key}": value for key, value in read_state_dict(TINY.vqgan).items()}
        state["loss.discriminator.main.3.num_batches_tracked"] = torch.tensor(3)
        torch.save({"state_dict": state}, tmp_path / "vqgan.ckpt")
        assert all(torch.equal(value, expected[key]) for key, value in load_tokenizer(tmp_path / "vqgan.ckpt").state_dict().items())


@pytest.mark.parametrize(
    "how",
    [
        "DistributedDataParallel of torch.compile",
        "AveragedModel",
        "Lightning",
        "beside what is no network",
        "positions in a buffer",
        "half precision",
        "float8",
    ],
)
def test_checkpoints_as_trainings_write_them(tmp_path: Path, how: str) -> None:
    state = read_state_dict(TINY.ckpt, UNUSED)
    torch.save(wrapped(state, how), tmp_path / "net.pth")
    found = read_state_dict(tmp_path / "net.pth", UNUSED)
    assert found.keys() == state.keys()
    for key, value in found.items():
        assert value.dtype == torch.float32 and torch.allclose(value, state[key], rtol=0.1, atol=0.01), key


def test_files_by_what_they_are(tmp_path: Path) -> None:
    """Safetensors of another name, and what was saved without checksums."""
    from safetensors.torch import save_file

    state = read_state_dict(TINY.ckpt)
    save_file(state, tmp_path / "net.pth")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "unchecked.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("net.pth", "unchecked.pth"):
        found = read_state_dict(tmp_path / name)
        assert all(torch.equal(value, state[key]) for key, value in found.items()) and found.keys() == state.keys()


def test_a_preset_is_of_its_sizes(tmp_path: Path) -> None:
    """A network of another width would be given the wrong number of heads, which no shape tells."""
    config = PRESETS["enat-l-256"].config
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Network(dataclasses.replace(config, dim=128, heads=2)).state_dict().items()}
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "net.pth")
    refused(
        export("--ckpt", tmp_path / "net.pth", "--preset", "enat-l-256", "--out", tmp_path / "x"), "its width is 128, the preset's 1024"
    )
    state = read_state_dict(TINY.ckpt, UNUSED)
    own = network_config(state, TINY.ckpt, heads=3)
    for size, words in (
        ("codes", "number of codes is 256"),
        ("num_classes", "number of classes is 10"),
        ("decoder_depth", "number of blocks is 5"),
    ):
        preset = dataclasses.replace(PRESETS["enat-l-256"], config=dataclasses.replace(own, **{size: 9}))
        with pytest.raises(CheckpointError, match=words):
            network_config(state, TINY.ckpt, preset=preset)


def test_presets() -> None:
    for preset in PRESETS.values():
        names = preset_class_names(preset)
        assert len(names) == len(set(names)) == preset.config.num_classes
    assert (names[207], names[88], names[0], names[999]) == ("golden retriever", "macaw", "tench", "toilet tissue")
    for name, grid, scale, temperature in (("enat-l-256", 16, 2.5, 6.0), ("enat-l-512", 32, 3.5, 4.0)):
        assert dataclasses.astuple(PRESETS[name].config) == (grid, 1024, 16, 22, 2, 1024, 1000)
        assert vars(PRESETS[name].sampling) == {"steps": 8, "cfg_scale": scale, "mask_temp": 1.5, "samp_temp": temperature}
