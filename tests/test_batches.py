"""Requests of many settings, drawn together where that is possible."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from enat import Pipeline
from enat.errors import BackendError, InputError
from enat.serving.batches import Picture, draw_all


def test_pictures_of_like_settings_are_drawn_together(bundled: Pipeline) -> None:
    batches: list[int] = []

    class Counting(Pipeline):
        def draw(self, labels: Sequence[int], *rest: Any, **named: Any) -> Any:
            batches.append(len(labels))
            return super().draw(labels, *rest, **named)

    rng = random.Random(0)
    kinds: list[dict[str, float]] = [{}, {"steps": 4}, {"steps": 8, "guidance": 1.0}]
    pictures = [Picture(rng.randrange(36), rng.randrange(1000), tuple(rng.choice(kinds).items())) for _ in range(30)]
    drawn = draw_all(Counting(bundled.manifest, bundled.backend), pictures, 8)
    counts = [sum(picture.settings == tuple(kind.items()) for picture in pictures) for kind in kinds]
    assert len(batches) == sum(-(-count // 8) for count in counts) and sum(batches) == 30
    for picture, image in zip(pictures, drawn, strict=True):
        (expected,) = bundled.generate([picture.label], seed=picture.seed, **dict(picture.settings))
        assert (image == expected).all()  # type: ignore[union-attr]


def test_a_failing_batch_fails_alone(bundled: Pipeline) -> None:
    class Failing(Pipeline):
        def draw(self, labels: Sequence[int], *rest: Any, **named: Any) -> Any:
            if 3 in labels:
                raise InputError("three")
            if 5 in labels:
                raise MemoryError
            return super().draw(labels, *rest, **named)

    pictures = [Picture(label, 0) for label in (1, 2, 3, 4, 5)]
    first, unwanted, failed, fourth, fifth = draw_all(Failing(bundled.manifest, bundled.backend), pictures, 1, lambda index: index != 1)
    assert isinstance(failed, InputError) and isinstance(fifth, BackendError) and unwanted is None
    assert isinstance(first, np.ndarray) and isinstance(fourth, np.ndarray)
