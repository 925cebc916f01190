"""How far an engine is from float32: the comparison and `enat-verify`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import invoke, list_anew, refused, with_initializers
from PIL import Image

from enat import Pipeline
from enat.calibration.products import find_products, int8_share, load_graphs
from enat.calibration.trajectory import divergence, record, replayed_logits, spread_labels
from enat.export.cli import main as export_main
from enat.export.compare import compare, engine_bytes, replayed, shares
from enat.export.directory import write_manifest
from enat.export.layers import layer_errors
from enat.export.verify_cli import main as verify_main
from enat.export.verify_cli import misses, side_by_side
from enat.graph_file import save
from enat.runtime.manifest import FILE, read_manifest
from enat.runtime.pipeline import BUNDLED_ENGINE


def enlarged(engine: Path, **layers: str) -> Path:
    """A copy of the bundled engine in which the weights of one layer of each of these graphs are larger by a fifth."""
    shutil.copytree(BUNDLED_ENGINE, engine)
    for name, layer in layers.items():
        model = load_graphs(read_manifest(engine), (name,))[name]
        tensor = model.graph.initializers[f"{layer}.weight"].const_value
        assert tensor is not None
        save(with_initializers(model, {f"{layer}.weight": tensor.numpy() * np.float32(1.2)}), engine / f"{name}.onnx")
        list_anew(engine)
    return engine


def test_an_engine_against_itself(bundled: Pipeline) -> None:
    found = compare(bundled, bundled, images=5, batch_size=2)
    assert found.divergence == 0 and found.top1 == found.tokens_equal == 1
    assert found.psnr is not None and found.psnr > 80
    assert found.positions.tolist() == [5 * step.masked for step in bundled.schedule()]


def test_seeds_go_on_from_zero(bundled: Pipeline) -> None:
    assert compare(bundled, bundled, images=3, seed=2**64 - 2, batch_size=2).tokens_equal == 1


def test_a_comparison_sees_what_was_changed(bundled: Pipeline, tmp_path: Path) -> None:
    """One bias of the logits moved: the divergence is that of two distributions known from float32 alone, and nothing else differs."""
    engine = tmp_path / "engine"
    shutil.copytree(BUNDLED_ENGINE, engine)
    graphs = load_graphs(read_manifest(engine))
    bias = next(node.inputs[1] for node in graphs["decoder"].graph if node.outputs[0].name == "logits")
    assert bias is not None and bias.const_value is not None
    values = bias.const_value.numpy().copy()
    values[0] += 5
    save(with_initializers(graphs["decoder"], {str(bias.name): values}), engine / "decoder.onnx")
    list_anew(engine)
    with Pipeline.load(engine) as changed:
        found = compare(changed, bundled, images=4)
    (one,) = record(bundled, spread_labels(bundled.manifest.model, 4), 0, batch_size=4)
    total = 0.0
    with bundled.backend.lease() as lane:
        expected = replayed_logits(lane, bundled.manifest, one)
    for logits in expected:
        moved = logits.copy()
        moved[..., 0] += 5  # guidance takes the difference of two rows: the same in both cancels out
        total += divergence(moved, logits).sum()
    assert found.divergence == pytest.approx(total / found.positions.sum(), rel=1e-4)
    assert found.divergence > 0.001
    assert (found.step_features == 0).all()
    assert 0.5 < found.top1 < 1


def test_figures_of_a_comparison(reference: Pipeline, tmp_path: Path) -> None:
    """Of an engine whose pictures, features and tokens are others: those of their definitions, worked out from its runs."""
    layers = {"image_decoder": "decoder.conv_out", "encoder": "prev_proj.mlp.fc2", "decoder": "mlm_layer.words"}
    with Pipeline.load(enlarged(tmp_path / "engine", **layers), "onnxruntime") as other:
        found = compare(other, reference, images=3, batch_size=2, keep_pictures=True)
        labels = spread_labels(reference.manifest.model, 3)
        tokens, own = (pipe.generate_tokens(labels, seed=0, batch_size=2) for pipe in (reference, other))
        expected, shown, drawn = (pipe.decode(of, batch_size=2) for pipe, of in ((reference, tokens), (other, tokens), (other, own)))
        runs = record(reference, labels, 0, 2)
        features, wanted = (np.concatenate([replayed(pipe, one)[-1][1] for one in runs]) for pipe in (other, reference))
    errors = ((shown.astype(float) - expected) ** 2).mean((1, 2, 3))
    assert found.psnr == pytest.approx(10 * np.log10(255**2 / errors.mean()))
    assert found.least_psnr == pytest.approx(10 * np.log10(255**2 / errors.max()))
    assert found.tokens_equal == pytest.approx((tokens == own).mean()) and found.tokens_equal < 1
    assert found.pictures is not None
    assert np.array_equal(found.pictures[0], expected) and np.array_equal(found.pictures[1], drawn)
    assert found.step_features[-1] == pytest.approx(np.sqrt(((features - wanted) ** 2).sum() / (wanted**2).sum()), rel=1e-3)


def test_a_layer_s_error_is_relative(reference: Pipeline, tmp_path: Path) -> None:
    with Pipeline.load(enlarged(tmp_path / "engine", decoder="mlm_layer.words"), "onnxruntime") as other:
        found = layer_errors(other, reference)
    assert found.pop("mlm_layer.words") == pytest.approx(0.2, rel=1e-4)
    assert max(found.values()) < 1e-6


def test_shares_and_sizes(int7: Path, tmp_path: Path) -> None:
    """Of an engine with a network in 8 bits and an image decoder in float; the image encoder does not count."""
    engine = Path(shutil.copytree(int7, tmp_path / "engine"))
    shutil.copy(BUNDLED_ENGINE / "image_decoder.onnx", engine)
    with Pipeline.load(list_anew(engine), "onnxruntime") as pipe:
        found = shares(pipe, pipe.schedule())
        assert found == {
            "network": 1,
            "image_decoder": 0,
            "all": pytest.approx(int8_share(find_products(load_graphs(pipe.manifest)), pipe.schedule())),
        }
        assert engine_bytes(pipe) == size(engine)


def size(engine: Path) -> int:
    return sum(path.stat().st_size for path in engine.glob("*.onnx") if path.stem != "image_encoder")


def test_what_was_missed() -> None:
    figures: Any = SimpleNamespace(divergence=0.1, top1=0.9, psnr=30.0)
    assert misses(figures, None, None, None) == misses(figures, 0.1, 0.9, 30.0) == []
    assert misses(figures, 0.09, 0.95, 31.0) == [
        "divergence 0.1, expected at most 0.09",
        "top-1 agreement 0.9, expected at least 0.95",
        "PSNR 30.0 dB, expected at least 31",
    ]


def test_float32_is_above() -> None:
    expected, found = (np.full((1, 8, 8, 3), level, np.uint8) for level in (0, 200))
    sheet = np.asarray(side_by_side(expected, found))
    assert (sheet[:8] == 0).all() and (sheet[-8:] == 200).all()


def test_enat_verify(int8: Path, tmp_path: Path) -> None:
    files = tmp_path / "new" / "sheet.png", tmp_path / "another" / "plot.png"
    result = invoke(
        verify_main, int8, "--against", BUNDLED_ENGINE, "--images", 14, "--seed", 5, "--json", "--sheet", files[0], "--plot", files[1]
    )
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["divergence"] < 0.01 and 0.9 < figures["top1"] <= 1 and figures["missed"] == []
    assert len(figures["steps"]) == 8
    assert 0 < figures["layers"]["blocks.0.mlp.fc2"] < 0.1
    assert "blocks.0.attn.own_value" not in figures["layers"]
    with Image.open(files[0]) as sheet:  # two rows of twelve, and two of the two that are left
        assert sheet.size == (12 * 66 - 2, 4 * 66 - 2)
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 1000
    with Image.open(files[1]) as plot:
        assert min(plot.size) > 500


def test_a_sheet_that_no_file_can_hold(fp16: Path, tmp_path: Path) -> None:
    """Refused before the work that it would be made from."""
    refused(
        invoke(verify_main, fp16, "--against", BUNDLED_ENGINE, "--images", 2000, "--sheet", tmp_path / "s.webp"),
        "790×22042 pixels; .webp holds at most",
    )


def test_enat_verify_to_read(fp16: Path) -> None:
    result = invoke(verify_main, fp16, "--against", BUNDLED_ENGINE, "--images", 2, "--class", "A", "--class", "B", "--min-top1", 0.9)
    assert result.exit_code == 0, result.stderr
    share = f"{size(fp16) / size(BUNDLED_ENGINE):.0%} of float32's"
    for words in ("top-1 agreement", "dB PSNR", "of the tokens are equal", "0.0% of those with constant weights", share):
        assert words in result.stdout


def test_an_engine_of_tokens_alone(tmp_path: Path, smallest: tuple[object, ...]) -> None:
    """No image decoder, no guidance, images that do not fill the batches."""
    engine = tmp_path / "engine"
    result = invoke(export_main, *smallest, "--guidance", 0, "--steps", 3, "--out", engine)
    assert result.exit_code == 0, result.stderr
    for name, options in (("fp16", ()), ("int8", ("--calibration-images", 9))):
        result = invoke(export_main, "--engine", engine, "--precision", name, "--out", tmp_path / name, *options)
        assert result.exit_code == 0, result.stderr
        result = invoke(verify_main, tmp_path / name, "--against", engine, "--images", 3, "--batch-size", 2, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["psnr"] is None
        refused(invoke(verify_main, tmp_path / name, "--against", engine, "--sheet", tmp_path / "s.png"), "has no image decoder")


def test_enat_verify_refuses(int8: Path, engines: Callable[[str], Path], tmp_path: Path) -> None:
    refused(invoke(verify_main, int8, "--against", engines("tiny")), "different models: dim is 192 and 48")
    refused(invoke(verify_main, int8, "--against", BUNDLED_ENGINE, "--images", 0), "expected 1 or more images")
    refused(invoke(verify_main, int8, "--against", BUNDLED_ENGINE, "--sheet", tmp_path / "s.txt"), "ends in .png")
    strict = invoke(verify_main, int8, "--against", BUNDLED_ENGINE, "--images", 2, "--max-divergence", 1e-9, "--min-psnr", 90)
    refused(strict, "divergence", "expected at most 1e-09", "PSNR", code=1)
    for option, value, message in (
        ("--max-divergence", "nan", "--max-divergence: expected a number of 0 or more, got nan"),
        ("--min-psnr", "inf", "--min-psnr: expected a number of 0 or more, got inf"),
        ("--min-top1", "97", "--min-top1: expected a number of 0 to 1, got 97.0 (did you mean 0.97?)"),
    ):
        refused(invoke(verify_main, int8, "--against", BUNDLED_ENGINE, option, value), message)
    refused(invoke(verify_main, int8, "--against", int8), "its precision is int8, expected fp32")
    refused(invoke(verify_main, int8, "--against", BUNDLED_ENGINE, "--seed", -1), "a seed of 0 to 2**64 - 1, got -1")
    other = tmp_path / "other"
    shutil.copytree(BUNDLED_ENGINE, other)
    for section, name, value in (
        ("source", "checkpoint_sha256", "0" * 64),
        ("source", "tokenizer_sha256", "0" * 64),
        ("model", "encoder_depth", 1),
        ("model", "decoder_depth", 1),
    ):
        content = json.loads((BUNDLED_ENGINE / FILE).read_text())
        content[section][name] = value
        write_manifest(other, content)
        with pytest.MonkeyPatch.context() as changed:  # before any of them is loaded
            changed.setattr("enat.export.verify_cli.open_backend", lambda *arguments: pytest.fail("loaded"))
            refused(invoke(verify_main, int8, "--against", other), f"different models: {name}")
