"""Do engines in other precisions draw as well, over thousands of pictures? The figures of docs/PRECISION.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from enat.demo.precisions import Drawn, Estimate, compare, evaluate_precisions
from enat.export.convert import Precision, convert_engine
from enat.runtime.pipeline import BUNDLED_ENGINE

REFERENCES = Path(__file__).parent.parent / "demo" / "evaluation"
PICTURES = 560  # a class: 20,160 in all


def test_what_a_difference_is() -> None:
    """Runs made up: one the same, one with less recognised and its features moved."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2000, 4)).astype(np.float32)
    recognised = rng.random(2000) < 0.9
    same = Drawn("same", features, recognised)
    worse = Drawn("worse", features + np.float32([0.1, 0, 0, 0]), recognised & (np.arange(2000) % 20 > 0))
    first, second, third = compare(same, [same, worse], (np.full(4, 1.0), np.eye(4)))
    assert first.accuracy.low < first.accuracy.value < first.accuracy.high
    assert first.accuracy.value == pytest.approx(recognised.mean())
    assert second.accuracy_difference == first.accuracy_difference == Estimate(0, 0, 0)
    assert third.accuracy_difference.value == pytest.approx(-recognised[::20].sum() / 2000)
    assert third.accuracy_difference.high < 0
    assert first.distance == pytest.approx(4, rel=0.1)  # four means that are one apart
    assert third.distance_ratio.high < 1  # moved towards the real ones


@pytest.mark.quality
def test_int8_draws_as_well(tmp_path: Path) -> None:
    convert_engine(BUNDLED_ENGINE, tmp_path / "int8", Precision("int8"))
    figures = evaluate_precisions([tmp_path / "int8"], REFERENCES, PICTURES, seed=0)
    print(*(one.shown() for one in figures), sep="\n")
    float32, other_seeds, int8 = figures
    assert float32.accuracy.value > 0.9
    assert abs(other_seeds.accuracy_difference.value) < 0.01  # what chance alone does
    assert abs(int8.accuracy_difference.value) <= 0.005
    assert abs(int8.distance_ratio.value - 1) <= 0.05
