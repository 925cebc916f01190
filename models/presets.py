"""The published models: how they are split, how they sample by default, and what their classes are called."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from ..errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Defaults of the sampling loop, as in the engine's manifest."""

    steps: int = 8
    cfg_scale: float = 2.5
    mask_temp: float = 1.5
    samp_temp: float = 6.0


@dataclass(frozen=True)
class Preset:
    heads: int
    encoder_depth: int
    grid: int
    num_classes: int
    sampling: Sampling
    class_names: str  # a file beside this one, one name a line


PRESETS = {
    "enat-l-256": Preset(16, 22, 16, 1000, Sampling(8, 2.5, 1.5, 6.0), "imagenet_classes.txt"),
    "enat-l-512": Preset(16, 22, 32, 1000, Sampling(8, 3.5, 1.5, 4.0), "imagenet_classes.txt"),
}


def preset(name: str) -> Preset:
    """Raises InputError for a name that is not in PRESETS."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_class_names(chosen: Preset) -> list[str]:
    return (files(__package__) / chosen.class_names).read_text("utf-8").splitlines()
