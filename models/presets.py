"""The published models: how they are split, how they sample by default, and what their classes are called."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from ..errors import InputError
from .config import NetworkConfig


@dataclass(frozen=True)
class Sampling:
    """Defaults of the sampling loop, as in the engine's manifest."""

    steps: int = 8
    cfg_scale: float = 2.5
    mask_temp: float = 1.5
    samp_temp: float = 6.0


@dataclass(frozen=True)
class Preset:
    config: NetworkConfig
    sampling: Sampling
    class_names: str  # a file beside this one, one name a line


def enat_l(grid: int) -> NetworkConfig:
    return NetworkConfig(grid, dim=1024, heads=16, encoder_depth=22, decoder_depth=2, codes=1024, num_classes=1000)


PRESETS = {
    "enat-l-256": Preset(enat_l(16), Sampling(8, 2.5, 1.5, 6.0), "imagenet_classes.txt"),
    "enat-l-512": Preset(enat_l(32), Sampling(8, 3.5, 1.5, 4.0), "imagenet_classes.txt"),
}


def preset(name: str) -> Preset:
    """Raises InputError for a name that is not in PRESETS."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_class_names(chosen: Preset) -> list[str]:
    return (files(__package__) / chosen.class_names).read_text("utf-8").splitlines()
