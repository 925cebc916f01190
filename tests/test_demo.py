"""The bundled engine draws what it should, and draws it the same way everywhere."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from enat import InputError, Pipeline
from enat.demo.fonts import CLASSES
from enat.demo.train_tokenizer import CONFIG, TRAINING_EPS, published, set_eps
from enat.demo.training import Run
from enat.runtime.classes import parse_classes
from enat.runtime.pipeline import BUNDLED_ENGINE

ROOT = Path(__file__).parent.parent


def test_size() -> None:
    assert sum(path.stat().st_size for path in BUNDLED_ENGINE.iterdir()) <= 20e6


def test_quality(bundled: Pipeline) -> None:
    """The figures of the demo's README, on fewer pictures."""
    from enat.demo.evaluate import evaluate

    figures = evaluate(bundled, ROOT / "demo" / "evaluation", num=20, seed=1234)
    assert figures["generated"]["accuracy"] >= 0.9
    assert figures["real"]["accuracy"] >= 0.95
    assert figures["spread"]["mean"] >= 0.6


def test_the_batch_does_not_matter(bundled: Pipeline) -> None:
    classes = [3, 14, 15, 9, 26]
    for steps, guidance in itertools.product((1, 8, 64), (0.0, 2.0)):
        together = bundled.generate(classes, seed=5, steps=steps, guidance=guidance)
        for batch_size in (1, 2, 3):
            apart = bundled.generate(classes, seed=5, steps=steps, guidance=guidance, batch_size=batch_size)
            assert np.array_equal(together, apart), (steps, guidance, batch_size)


def test_classes(bundled: Pipeline) -> None:
    model = bundled.manifest.model
    assert "".join(model.class_names or ()) == CLASSES
    assert parse_classes(model, ["R", "r", "7", "#7", "A-C", "0-2", "#0-#1"]) == [17, 17, 33, 7, 0, 1, 2, 26, 27, 28, 0, 1]
    assert parse_classes(model, ["R,7, A-C"]) == parse_classes(model, ["R", "7", "A-C"])
    assert parse_classes(model, ["all"]) == list(range(36))
    for word, message in (
        ("9-35", "expected a range of names or of numbers, got '9-35': '9' is a name, '35' a number; #9-#35 is one of numbers"),
        ("0-#27", "'0' is a name, '#27' a number; #0-#27 is one of numbers"),
        ("12-A", "'A' is a name, '12' a number"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            parse_classes(model, [word])


def test_real_pictures_survive_the_tokenizer() -> None:
    """Encoded and decoded by the checkpoints that the engine was made from."""
    import torch

    from enat.models.checkpoint import load_tokenizer
    from enat.models.tokenizer import to_uint8

    tokenizer = load_tokenizer(ROOT / "demo" / "checkpoints" / "vqgan.ckpt")
    with np.load(ROOT / "demo" / "evaluation" / "held_out.npz") as data:
        pictures = data["pictures"][::7]
    with torch.inference_mode():
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        decoded = to_uint8(tokenizer.decode(tokenizer.encode(images))).numpy()
    assert np.abs(decoded.astype(int) - pictures).mean() < 0.06 * 255


def test_a_training_run_goes_on(tmp_path: Path) -> None:
    """Its log is that of a run that was never interrupted, whatever its steps draw at random."""
    import torch

    def steps(run: Run, count: int) -> None:
        for step in itertools.islice(run.remaining(), count):
            run.finish_step(number=torch.tensor(float(step)), drawn=torch.rand(()))

    steps(Run(tmp_path / "whole", 20, log_every=4, save_seconds=0), 20)
    first = Run(tmp_path / "part", 20, log_every=4)
    steps(first, 6)
    first.save()
    steps(first, 4)  # lost
    second = Run(tmp_path / "part", 20, log_every=4)
    assert second.step == 6
    steps(second, 99)
    whole, part = ((tmp_path / name / "log.csv").read_text().split() for name in ("whole", "part"))
    assert part[2].startswith("8,6.5,") and [*part[:2], *part[3:]] == [*whole[:2], *whole[3:]]  # of steps 6 and 7 alone


def test_the_trained_eps_becomes_the_published_one() -> None:
    import torch

    from enat.models.tokenizer import Tokenizer

    torch.manual_seed(0)
    model = Tokenizer(CONFIG).eval().requires_grad_(False)
    set_eps(model, TRAINING_EPS)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    images = torch.rand(1, 3, 64, 64)
    features = model.encoder(images)
    pictures = model.decoder(features)
    published(model)
    torch.testing.assert_close(model.encoder(images), features)
    torch.testing.assert_close(model.decoder(features), pictures)


def test_the_bundled_engine_is_used_and_that_is_said(tmp_path: Path) -> None:
    out = tmp_path / "r.png"
    code = "from enat.runtime.cli import main; main()"
    arguments = ["--class", "R", "--num", "8", "--seed", "7", "--out", str(out), "--grid"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "using the bundled one" in result.stderr
    with Image.open(out) as image:
        assert image.size == (8 * 66 - 2, 64)
