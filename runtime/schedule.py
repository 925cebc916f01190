"""The sampling schedule: how many tokens each step reveals, and at which guidance and temperatures. Chang et al., "MaskGIT", 2022."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, SupportsIndex

import numpy as np

from ..errors import InputError
from .classes import whole
from .manifest import LARGEST_SETTING


@dataclass(frozen=True)
class Step:
    """One step of the loop: `masked` tokens enter it, `keep` stay so; `new` were revealed by the step before, `seen` earlier."""

    index: int
    seen: int
    new: int
    masked: int
    keep: int
    guidance: float
    sampling_temperature: float
    mask_temperature: float

    @property
    def visible(self) -> int:
        return self.seen + self.new


def kept(length: int, steps: int, index: int) -> int:
    """How many of `length` tokens stay masked after step `index` (from 0) of `steps`: floor(length · cos(r·π/2)), 0 after the last."""
    if index + 1 == steps:
        return 0
    return math.floor(length * math.cos((index + 1) / steps * math.pi / 2))


def check_steps(length: int, steps: SupportsIndex) -> int:
    """The number as an int. Raises InputError unless a run over `length` tokens can have so many steps."""
    number = whole(steps, f"1 to {length} steps")
    if not 1 <= number <= length:
        raise InputError(f"expected 1 to {length} steps, got {number}")
    return number


def check_setting(name: str, value: float | np.floating[Any]) -> float:
    """The number as a float, since NumPy's narrower ones overflow in what is computed from them. Raises InputError."""
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        number = math.inf
    if not 0 <= number <= LARGEST_SETTING:  # not so of NaN
        raise InputError(f"expected a {name} of 0 to 1e6, got {number if number == math.inf else value!r:.40}")
    return number


def schedule(length: int, steps: int, guidance: float, mask_temperature: float, sampling_temperature: float) -> list[Step]:
    """The steps of a run over `length` tokens; of very many, some reveal nothing.

    guidance: at the end; it rises linearly from 0. mask_temperature, sampling_temperature: at the start; they fall linearly.
    Raises InputError where a setting is out of its range.
    """
    steps = check_steps(length, steps)
    guidance = check_setting("guidance", guidance)
    mask_temperature = check_setting("mask temperature", mask_temperature)
    sampling_temperature = check_setting("sampling temperature", sampling_temperature)
    result: list[Step] = []
    masked, new = length, 0
    for index in range(steps):
        remaining = 1 - (index + 1) / steps
        keep = kept(length, steps, index)
        seen = length - masked - new
        temperature = max(sampling_temperature * remaining, 1e-3)
        result.append(Step(index, seen, new, masked, keep, guidance * index / steps, temperature, mask_temperature * remaining))
        masked, new = keep, masked - keep
    return result
