"""enat-export as its users call it, and what it refuses."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import Result
from conftest import DATA, invoke, read_golden, refused

from enat import Pipeline
from enat.errors import ExportError, InputError
from enat.export import verify
from enat.export.cli import main
from enat.export.directory import name_leftovers, put_in_place
from enat.export.tables import sampler_graph
from enat.graph_file import save
from enat.models.checkpoint import read_state_dict
from enat.models.config import NetworkConfig
from enat.runtime.manifest import FILE, sha256
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
    assert manifest["source"] == {"checkpoint_sha256": sha256(TINY.ckpt), "tokenizer_sha256": sha256(TINY.vqgan)}


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


def test_force_replaces_an_engine_and_nothing_else(
    engine_copy: Path, smallest: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(export(*smallest, "--out", engine_copy), "engine: exists; --force replaces it")
    assert export(*smallest, "--out", engine_copy, "--force").exit_code == 0
    assert not (engine_copy / "image_decoder.onnx").exists()
    for name in (".DS_Store", ".manifest.json.0123abcd.partial", "tensorrt/.0123.partial/encoder.plan"):
        (engine_copy / name).parent.mkdir(parents=True, exist_ok=True)
        (engine_copy / name).touch()
    monkeypatch.chdir(engine_copy)
    assert export(*smallest, "--out", "../beside").exit_code == 0
    monkeypatch.chdir(tmp_path)
    assert export(*smallest, "--out", engine_copy, "--force").exit_code == 0
    (engine_copy / "notes").mkdir()
    (engine_copy / "notes" / "thesis.txt").write_text("years of work")
    refused(export(*smallest, "--out", engine_copy, "--force"), "holds what is no part of the engine (notes/thesis.txt)")
    refused(export(*smallest, "--out", engine_copy / "notes" / "inner"), f"lies in {engine_copy}, which is an engine")
    refused(export(*smallest, "--out", tmp_path / "new" / ".."), "expected a folder by its own name")
    assert (engine_copy / "notes" / "thesis.txt").exists() and not (tmp_path / "new").exists()
    shutil.rmtree(engine_copy / "notes")
    (engine_copy / "elsewhere").symlink_to(tmp_path)
    refused(export(*smallest, "--out", engine_copy, "--force"), "holds what is no part of the engine (elsewhere)")
    extension = tmp_path / "extension"
    extension.mkdir()
    (extension / FILE).write_text('{"manifest_version": 3}')
    refused(export(*smallest, "--out", extension, "--force"), "exists and is not an engine")
    assert export(*smallest, "--out", extension / "engine").exit_code == 0
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


def test_an_old_engine_that_cannot_be_put_back_is_kept(engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in engine_copy.iterdir()}
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if target == engine_copy:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr("enat.runtime.files.exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ExportError, match="Input/output error"), put_in_place(engine_copy, force=True) as folder:
        (folder / FILE).write_text("{}")
    (old,) = engine_copy.parent.iterdir()
    assert old.name.endswith(".old") and {path.name: path.read_bytes() for path in old.iterdir()} == before


def test_what_came_while_an_engine_was_made_stays(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    with pytest.raises(InputError, match="engine: exists; --force replaces it"), put_in_place(out, force=False) as folder:
        (folder / FILE).write_text("{}")
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    assert (out / "thesis.txt").read_text() == "years of work" and [path.name for path in tmp_path.iterdir()] == ["engine"]


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
    with pytest.warns(RuntimeWarning) as told:
        name_leftovers(engine_copy, own=engine_copy.with_name(names[2]))
    assert len(told) == len(names) - 1 and not any(str(one.message).startswith(str(engine_copy.with_name(names[2]))) for one in told)


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
    """With a mark of the byte order in front, and a blank line at the end."""
    names, found = tmp_path / "names.txt", []
    names.write_bytes("\ufeffé 0\r\nclass 1\r\n\r\n".encode())
    asked = ("--ckpt", TINY.ckpt, *SPLIT, "--class-names", names)
    refused(export(*asked, "--out", tmp_path / "engine"), "expected 10 class names, got 2")
    monkeypatch.setattr("enat.export.engine.export_engine", lambda *rest, class_names, **options: found.extend(class_names))
    assert export(*asked, "--out", tmp_path / "engine").exit_code == 0
    assert found == ["é 0", "class 1"]
    names.write_bytes("é".encode("latin-1"))
    refused(export(*asked, "--out", tmp_path / "x"), "names.txt: expected UTF-8 text")


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
    right = verify.log_softmax
    monkeypatch.setattr(verify, "log_softmax", lambda logits: right(1.1 * logits))
    result = export(*smallest, "--out", tmp_path / "engine")
    refused(result, "sampler.onnx: departs from its rule by ", "expected at most 1e-04", code=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("grid", "codes"), [(2, 2), (8, 512), (16, 8192), (32, 1024)])
def test_samplers_of_any_size_keep_their_rule(tmp_path: Path, grid: int, codes: int) -> None:
    """Many codes, whose cumulative sums are rounded in many places; and what departs from the rule is found."""
    save(sampler_graph(grid**2, codes), tmp_path / "sampler.onnx")
    config = NetworkConfig(grid, 8, 1, 1, 1, codes, 3)
    assert verify.check_sampler(tmp_path / "sampler.onnx", verify.sampler_cases(config)).largest_error < 1e-4
    (tensors, found), *_ = verify.run_cases(tmp_path / "sampler.onnx", verify.sampler_cases(config))
    inputs = {name: value.numpy() for name, value in tensors.items()}
    assert verify.sampler_error(inputs, found) < 1e-4
    for changed in (
        {"tokens": (found["tokens"] + 1) % codes},
        {"tokens": found["tokens"] + codes},
        {"revealed_tokens": (found["revealed_tokens"] + 1) % codes},
        {"revealed_positions": found["masked_positions"][:, :2]},
        {
            "revealed_positions": found["masked_positions"][:, :2],
            "masked_positions": np.hstack((found["revealed_positions"], found["masked_positions"][:, 2:])),
        },
        {"masked_positions": found["masked_positions"][:, 1:]},
    ):
        assert verify.sampler_error(inputs, {**found, **changed}) > 1e-3, list(changed)
    assert verify.sampler_error(inputs, {**found, "masked_positions": found["masked_positions"][:, ::-1]}) < 1e-4  # in any order


def test_no_code_without_probability_is_drawn(tmp_path: Path) -> None:
    """Not even where the noise is 0: a cumulative sum that is not above it stands for no code."""
    save(sampler_graph(4, 3), tmp_path / "sampler.onnx")
    inputs: dict[str, object] = {
        "logits": np.tile(np.array([-1e4, -1e4, 0], np.float32), (1, 4, 1)),
        "positions": np.arange(4)[None],
        "keep": np.array(0),
        **{name: np.zeros((1, 4), np.float32) for name in ("choice_noise", "confidence_noise")},
        **{name: np.array(1, np.float32) for name in ("guidance", "sampling_temperature", "mask_temperature")},
    }
    (tokens,) = ort.InferenceSession(tmp_path / "sampler.onnx").run(["tokens"], inputs)
    assert tokens.tolist() == [[2] * 4]


@pytest.mark.parametrize(
    ("value", "reference", "words"),
    [
        (4.0, lambda x: 1.001 * x.sqrt(), "y differs from PyTorch by 9.99e-04, expected at most 1e-04"),
        (-1.0, torch.zeros_like, "y differs from PyTorch by nan"),
        (4.0, lambda x: x.sqrt().double(), r"expected float64 \[1\], the graph gives float32 \[1\]"),
        (4.0, lambda x: x.sqrt()[None], r"expected float32 \[1, 1\], the graph gives float32 \[1\]"),
    ],
    ids=["values", "not a number", "type", "shape"],
)
def test_graphs_that_differ_from_pytorch_are_refused(
    tmp_path: Path, value: float, reference: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    text = '<ir_version: 10, opset_import: ["": 20]> g (float[n] x) => (float[n] y) { y = Sqrt(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "g.onnx")
    assert verify.check_graph(tmp_path / "g.onnx", torch.sqrt, iter([{"x": torch.tensor([4.0])}])).largest_error < 1e-6
    with pytest.raises(ExportError, match=words):
        verify.check_graph(tmp_path / "g.onnx", reference, iter([{"x": torch.tensor([value])}]))


def test_whole_numbers_may_hardly_differ() -> None:
    """Few pixels by one level, none by more."""
    wanted = np.full(1000, 7, np.uint8)
    for places, other, allowed in ((10, 8, True), (20, 8, False), (1, 9, False)):
        found = wanted.copy()
        found[:places] = other
        error, limit = verify.difference(found, wanted)
        assert (error <= limit) == allowed, (places, other)


def test_codes_are_the_nearest() -> None:
    """But for rounding, whatever the number of tokens."""
    distances = np.array([[[0.0, 1e-5, 1e-3, 1.0], [2.0, 0.5, 0.5, 2.0]]], np.float32)
    for chosen in ([0, 1], [1, 2]):
        assert verify.nearest_error(distances, np.array([chosen])) <= verify.FLOAT_TOLERANCE
    for chosen in ([2, 1], [0, 0], [4, 1], [-1, 1], [0]):
        assert verify.nearest_error(distances, np.array([chosen])) > verify.FLOAT_TOLERANCE
    assert verify.nearest_error(distances, np.array([[0, 1]], np.int32)) == np.inf
    assert verify.nearest_error(distances[..., :1], np.array([[0, 0]])) == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--heads", "5"], ["48 must be divisible by the number of heads, got 5"]),
        (["--heads", "3", "--encoder-depth", "5"], ["5 blocks", "1 to 4, got 5"]),
        ([], ["48 is not a multiple", "--heads"]),
        (["--preset", "enat-l-256"], ["its grid is 8, the preset's 16"]),
        (["--preset", "enat-s"], ["enat-s"]),
        ([*SPLIT, "--steps", "65"], ["1 to 64 steps, got 65"]),
        ([*SPLIT, "--steps", "4,8"], ["expected one number of --steps, got 4,8; more of them go with --tensorrt"]),
        ([*SPLIT, "--max-batch", "4"], ["--max-batch goes with --tensorrt"]),
        ([*SPLIT, "--image-encoder"], ["--image-encoder goes with --vqgan"]),
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
