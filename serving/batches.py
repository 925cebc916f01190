"""Requests of many clients as batches of one pipeline: pictures that share their settings are drawn together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, EnatError
from ..runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Picture:
    """One picture to draw. settings: of manifest.SETTINGS, those that are not the engine's own."""

    label: int
    seed: int
    settings: tuple[tuple[str, float], ...] = ()


Drawn = NDArray[np.uint8] | EnatError  # [height, width, 3], or why there is none


def draw_all(
    pipeline: Pipeline, pictures: Sequence[Picture], batch_size: int, wanted: Callable[[int], bool] = lambda index: True
) -> list[Drawn | None]:
    """Draws pictures of any settings, as few batches as these allow, in the order given.

    wanted: asked with a picture's index just before its batch is drawn; where it says no, the picture is None. A batch that fails gives
    its error in place of its pictures, and the others are drawn.
    """
    groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        groups.setdefault(picture.settings, []).append(index)
    result: list[Drawn | None] = [None] * len(pictures)
    for settings, members in groups.items():
        steps = pipeline.schedule(**dict(settings))  # type: ignore[arg-type]
        for first in range(0, len(members), batch_size):
            chosen = [index for index in members[first : first + batch_size] if wanted(index)]
            if not chosen:
                continue
            labels, seeds = [pictures[index].label for index in chosen], [pictures[index].seed for index in chosen]
            drawn: Sequence[Drawn]
            try:
                ((images,),) = pipeline.draw(labels, seeds, steps, batch_size, images=True)
                drawn = list(images)
            except EnatError as error:
                drawn = [error] * len(chosen)
            except Exception as error:  # whatever it is, memory that is short, say: the other batches are drawn
                drawn = [BackendError(f"{type(error).__name__}: {error!s:.200}")] * len(chosen)
            for index, one in zip(chosen, drawn, strict=True):
                result[index] = one
    return result
