"""enat-export as its users call it, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from conftest import DATA, Golden, invoke, read_golden, refused

from enat import Pipeline
from enat.errors import CheckpointError, ExportError
from enat.export.cli import main
from enat.export.directory import put_in_place
from enat.models.checkpoint import load_network, load_tokenizer, read_state_dict
from enat.models.network import Network
from enat.models.presets import PRESETS, preset_class_names
from enat.runtime.manifest import FILE
from enat.runtime.pipeline import BUNDLED_ENGINE

TINY = read_golden("tiny")
SPLIT = ("--heads", "3", "--encoder-depth", "3")


def export(*arguments: object) -> Result:
    return invoke(main, *arguments)


CONTRACT = {
    "condition": ({"labels": ("rows",)}, ["encoder_modulation", "decoder_modulation"]),
    "encoder": (
        {
            "tokens": ("batch", "new"),
            "positions": ("batch", "new"),
            "features": ("rows", "seen", 48),
            "encoder_modulation": ("rows", 3, 8, 48),
        },
        ["visible_features"],
    ),
    "decoder": (
        {"positions": ("batch", "masked"), "features": ("rows", "visible", 48), "decoder_modulation": ("rows", 2, 8, 48)},
        ["logits"],
    ),
    "sampler": (
        {
            "logits": ("rows", "masked", 256),
            "positions": ("batch", "masked"),
            "choice_noise": ("batch", 64),
            "confidence_noise": ("batch", 64),
            "guidance": (),
            "sampling_temperature": (),
            "mask_temperature": (),
            "keep": (),
        },
        ["tokens", "revealed_tokens", "revealed_positions", "masked_positions"],
    ),
    "image_decoder": ({"tokens": ("batch", 64), "positions": ("batch", 64)}, ["images"]),
    "image_encoder": ({"images": ("batch", 32, 32, 3)}, ["tokens"]),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_graphs_keep_the_contract(engines: Callable[[str], Path], name: str) -> None:
    path = engines("tiny") / f"{name}.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    inputs, outputs = CONTRACT[name]
    found = {value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in model.graph.input}
    assert found == inputs
    assert [value.name for value in model.graph.output] == outputs
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    assert model.ir_version <= 10
    assert not model.functions
    # nothing of the machine that it was made on
    assert b".py" not in path.read_bytes()
    # shapes are those of inputs, or known
    assert {node.input[0] for node in model.graph.node if node.op_type == "Shape"} <= set(inputs)


def test_manifest(engines: Callable[[str], Path]) -> None:
    manifest = json.loads((engines("tiny") / "manifest.json").read_text())
    assert manifest["format"] == "enat-engine"
    assert manifest["version"] == 1
    assert manifest["model"] == {
        "grid": 8, "dim": 48, "heads": 3, "encoder_depth": 3, "decoder_depth": 2, "codes": 256, "num_classes": 10,
        "image_size": 32, "class_names": None,
    }  # fmt: skip
    assert manifest["sampling"] == TINY.sampling
    assert (manifest["precision"], manifest["float_type"], manifest["opset"]) == ("fp32", "float32", 20)
    assert len(manifest["source"]["checkpoint_sha256"]) == 64


def test_the_command(tmp_path: Path) -> None:
    """Without a tokenizer, from safetensors with the prefix of data parallelism, into a folder that does not exist yet."""
    from safetensors.torch import save_file

    state = {f"module.{key}": value for key, value in read_state_dict(TINY.ckpt).items()}
    save_file(state, tmp_path / "net.safetensors")
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"))
    out = tmp_path / "new" / "engine"
    result = export(
        "--ckpt", tmp_path / "net.safetensors", *SPLIT, "--steps", 5, "--class-names", tmp_path / "names.txt", "--out", out
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "encoder: 6 shapes, error at most" in result.stderr
    assert sorted(os.listdir(out)) == ["condition.onnx", "decoder.onnx", "encoder.onnx", "manifest.json", "sampler.onnx"]  # noqa: PTH208
    assert [path.name for path in out.parent.iterdir()] == ["engine"]
    pipeline = Pipeline.load(out)
    assert pipeline.manifest.sampling.steps == 5
    assert pipeline.generate_tokens(["c"], seed=1).shape == (1, 8, 8)


def test_force_replaces_an_engine_and_nothing_else(engine_copy: Path, smallest: tuple[object, ...], tmp_path: Path) -> None:
    refused(export(*smallest, "--out", engine_copy), "engine: exists; --force replaces it")
    assert export(*smallest, "--out", engine_copy, "--force").exit_code == 0
    assert not (engine_copy / "image_decoder.onnx").exists()
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.txt").write_text("years of work")
    refused(export(*smallest, "--out", documents, "--force"), "not an engine")
    refused(export(*smallest, "--out", documents / "thesis.txt", "--force"), "not a directory")
    assert (documents / "thesis.txt").read_text() == "years of work"


def test_what_is_read_is_not_replaced(engine_copy: Path, smallest: tuple[object, ...], tmp_path: Path) -> None:
    """Inputs that lie in the folder that --force replaces."""
    inside, link = engine_copy / "net.pth", tmp_path / "link.pth"
    shutil.copy(str(smallest[1]), inside)
    link.symlink_to(inside)
    before = sorted(engine_copy.iterdir())
    calibration = engine_copy / "c.npz"
    for arguments in (
        ("--ckpt", inside, *smallest[2:]),
        ("--ckpt", link, *smallest[2:]),
        (*smallest, "--vqgan", engine_copy / "vqgan.ckpt"),
        (*smallest, "--precision", "int8", "--class-names", engine_copy / "manifest.json"),
        ("--engine", engine_copy, "--precision", "fp16"),
        ("--engine", engine_copy.parent / "engine" / ".", "--precision", "int8"),
        ("--engine", BUNDLED_ENGINE, "--precision", "int8", "--calibration", calibration),
    ):
        refused(export(*arguments, "--out", engine_copy, "--force"), str(engine_copy))
    refused(export("--ckpt", inside, *smallest[2:], "--out", engine_copy, "--force"), "which would be replaced; choose another folder")
    assert sorted(engine_copy.iterdir()) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(16, "Device or resource busy")])
def test_a_swap_that_stops_half_way(engine_copy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The new engine cannot be put in place, or not any more: the old one is where it was, and nothing lies beside it."""
    before = {path.name: path.read_bytes() for path in engine_copy.iterdir()}
    rename = Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises((KeyboardInterrupt, ExportError)), put_in_place(engine_copy, force=True) as folder:
        (folder / FILE).write_text("{}")
    assert [path.name for path in engine_copy.parent.iterdir()] == ["engine"]
    assert {path.name: path.read_bytes() for path in engine_copy.iterdir()} == before


def test_what_a_killed_export_left_is_named(engine_copy: Path) -> None:
    names = [".engine.1234abcd.partial", ".engine.1234abcd.old", ".engine.1234abcd.float32", "..engine.1234abcd.float32.1234abcd.partial"]
    for name in (*names, ".other.1234abcd.partial", ".engine.int8.1234abcd.partial"):
        engine_copy.with_name(name).mkdir()
    result = export("--engine", engine_copy, "--precision", "fp16", "--out", engine_copy, "--force")
    refused(result, "which would be replaced")
    result = export("--ckpt", "nowhere.pth", "--out", engine_copy, "--force")
    lines = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    assert [line.partition(": another export writes here, or was killed")[0] for line in lines] == [
        f"Warning: {engine_copy.with_name(name)}" for name in sorted(names)
    ]


def test_where_an_engine_does_not_go(engine_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(engine_copy)
    refused(export("--ckpt", TINY.ckpt, "--out", tmp_path / "link", "--force"), f"is a link, to {engine_copy}; name what it leads to")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for out in (".", tmp_path):
        refused(export("--ckpt", TINY.ckpt, "--out", out, "--force"), "is or holds the working directory, which cannot be replaced")
    arguments = ("--ckpt", TINY.ckpt, *SPLIT, "--precision", "int8", "--out", tmp_path / "x")
    refused(export(*arguments, "--calibration", tmp_path / "empty/../x/c.npz"), "a calibration is not a part of the engine")
    result = export(*arguments, "--calibration-classes", "99")
    refused(result, "unknown class" if "unknown" in result.stderr else "expected a class of 0 to 9, got 99")
    assert "condition" not in result.stderr  # it was found out before the work


def test_a_mount_point_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    refused(export("--ckpt", TINY.ckpt, *SPLIT, "--out", tmp_path), "a mount point cannot be replaced; choose a folder in it")


def test_class_names_as_windows_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, found = tmp_path / "names.txt", []
    names.write_bytes("\ufeffé 0\r\nclass 1\r\n".encode())
    monkeypatch.setattr("enat.export.engine.export_engine", lambda *rest, class_names, **options: found.extend(class_names))
    assert export("--ckpt", TINY.ckpt, *SPLIT, "--class-names", names, "--out", tmp_path / "engine").exit_code == 0
    assert found == ["é 0", "class 1"]
    names.write_bytes("é".encode("latin-1"))
    refused(export("--ckpt", TINY.ckpt, *SPLIT, "--class-names", names, "--out", tmp_path / "x"), "names.txt: expected UTF-8 text")


def test_an_interrupted_export_leaves_nothing(engine_copy: Path, smallest: tuple[object, ...]) -> None:
    """SIGTERM while it works, over an engine that exists: that one stays, and nothing lies beside it."""
    before = {path.name: path.read_bytes() for path in engine_copy.iterdir()}
    code = "from enat.export.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, smallest), "--out", str(engine_copy), "--force"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(engine_copy.parent.glob(".engine.*.partial/*"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    assert [path.name for path in engine_copy.parent.iterdir()] == ["engine"]
    assert {path.name: path.read_bytes() for path in engine_copy.iterdir()} == before


def test_a_graph_that_computes_something_else_is_not_put_in_place(
    tmp_path: Path, smallest: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from enat.export import verify

    right = verify.reference_sampler
    monkeypatch.setattr(verify, "reference_sampler", lambda **inputs: right(**{**inputs, "guidance": inputs["guidance"] + 1}))
    result = export(*smallest, "--out", tmp_path / "engine")
    refused(result, "sampler.onnx", "differs from PyTorch", code=1)
    assert list(tmp_path.iterdir()) == []


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
    "missing", "truncated", "empty", "hostile", "hostile zip", "a folder", "two networks", "something else among them", "whole numbers",
    "complex numbers", "sparse", "too large", "another model", "missing keys", "unknown keys", "a wrong shape", "not finite",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    path, message = damaged(tmp_path, kind)
    refused(export("--ckpt", path, *SPLIT, "--out", tmp_path / "engine"), str(path), message)
    assert not (tmp_path / "hostile-was-here").exists()
    assert [file.name for file in tmp_path.iterdir() if file != path] == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--heads", "5"], ["48 must be divisible by the number of heads, got 5"]),
        (["--heads", "3", "--encoder-depth", "5"], ["5 blocks", "1 to 4, got 5"]),
        ([], ["48 is not a multiple", "--heads"]),
        (["--preset", "enat-l-256"], ["its grid is 8, the preset's 16"]),
        (["--preset", "enat-s"], ["enat-s"]),
        ([*SPLIT, "--steps", "65"], ["1 to 64 steps, got 65"]),
        ([*SPLIT, "--guidance", "-1"], ["guidance of 0 to 1e6, got -1.0"]),
        ([*SPLIT, "--vqgan", str(DATA / "odd" / "vqgan.ckpt")], ["256 codes but the tokenizer has 128"]),
        ([*SPLIT, "--vqgan", str(TINY.ckpt)], ["not a VQGAN"]),
        ([*SPLIT, "--class-names", str(DATA / "tiny" / "none.txt")], ["none.txt"]),
    ],
)
def test_arguments_that_are_refused(tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    refused(export("--ckpt", TINY.ckpt, *arguments, "--out", tmp_path / "engine"), *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(export("--ckpt", TINY.ckpt, *SPLIT, "--out", tmp_path / "file" / "engine"), "file/engine: cannot be written")


def test_sizes_are_read_off_the_shapes(golden: Golden) -> None:
    network = load_network(golden.ckpt, **golden.split)
    case = golden.case
    wanted = (case["grid"], case["dim"], case["encoder_depth"], case["decoder_depth"], case["codebook_size"], case["num_classes"])
    config = network.config
    assert (config.grid, config.dim, config.encoder_depth, config.decoder_depth, config.codes, config.num_classes) == wanted
    assert load_tokenizer(golden.vqgan).config.codes == case["codebook_size"]
    with pytest.raises(CheckpointError, match="not a VQGAN"):
        load_tokenizer(golden.ckpt)


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
        case "half precision":
            return {key: value.bfloat16() for key, value in state.items()}
        case "float8":
            return {**state, "norm.bias": state["norm.bias"].to(torch.float8_e4m3fn)}
    raise AssertionError(how)


def test_a_tokenizer_with_what_its_training_used(tmp_path: Path) -> None:
    """A discriminator's counters are no floats, and no part of the tokenizer."""
    state = {**read_state_dict(TINY.vqgan), "loss.discriminator.main.3.num_batches_tracked": torch.tensor(3)}
    torch.save({"state_dict": state}, tmp_path / "vqgan.ckpt")
    expected = load_tokenizer(TINY.vqgan).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in load_tokenizer(tmp_path / "vqgan.ckpt").state_dict().items())


@pytest.mark.parametrize("how", ["DistributedDataParallel of torch.compile", "AveragedModel", "Lightning", "half precision", "float8"])
def test_checkpoints_as_trainings_write_them(tmp_path: Path, how: str) -> None:
    state = read_state_dict(TINY.ckpt)
    torch.save(wrapped(state, how), tmp_path / "net.pth")
    found = read_state_dict(tmp_path / "net.pth")
    assert found.keys() == state.keys()
    for key, value in found.items():
        assert value.dtype == torch.float32 and torch.allclose(value, state[key], rtol=0.1, atol=0.01), key


def test_a_preset_is_of_its_sizes(tmp_path: Path) -> None:
    """A network of another width would be given the wrong number of heads, which no shape tells."""
    config = PRESETS["enat-l-256"].config
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Network(dataclasses.replace(config, dim=128, heads=2)).state_dict().items()}
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "net.pth")
    refused(
        export("--ckpt", tmp_path / "net.pth", "--preset", "enat-l-256", "--out", tmp_path / "x"), "its width is 128, the preset's 1024"
    )


def test_presets() -> None:
    for preset in PRESETS.values():
        names = preset_class_names(preset)
        assert len(names) == len(set(names)) == preset.config.num_classes
    assert (names[207], names[88], names[0], names[999]) == ("golden retriever", "macaw", "tench", "toilet tissue")
    assert vars(PRESETS["enat-l-512"].sampling) == {"steps": 8, "cfg_scale": 3.5, "mask_temp": 1.5, "samp_temp": 4.0}


def test_external_data(engines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights over the limit lie beside their graph, and the engine runs the same."""
    import enat.graph_file as graph_file

    inline, external = engines("tiny"), tmp_path / "external"
    monkeypatch.setattr(graph_file, "EXTERNAL_DATA_FROM", 100_000)
    assert export("--ckpt", TINY.ckpt, *SPLIT, "--out", external).exit_code == 0
    assert (external / "encoder.onnx.data").exists()
    assert "encoder.onnx.data" in json.loads((external / "manifest.json").read_text())["files"]
    found, expected = (Pipeline.load(engine).generate_tokens([1, 2], seed=1) for engine in (external, inline))
    assert np.array_equal(found, expected)


def test_a_full_disk(tmp_path: Path, smallest: tuple[object, ...]) -> None:
    """No file may grow beyond 200 kB, which the encoder would: one line, exit code 1, nothing left."""
    code = "from enat.export.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, smallest), "--out", str(tmp_path / "engine")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("[")]
    assert line.startswith(f"Error: {tmp_path / 'engine'}: not written: ")
    assert list(tmp_path.iterdir()) == []
