"""Whether a backend's kernels for 8-bit numbers add rightly on this machine: tried, not looked up by the CPU's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..manifest import Manifest
from . import Array

SAFE_WEIGHT_BITS = 7
PROBE = Path(__file__).parent / "int8_probe.onnx"  # x [1, 64] → y [1, 16]: a product with weights of 127
DEPTH, LARGEST = 64, 127

OVERFLOW = "this CPU's fast int8 kernels overflow (it has no VNNI)"
REMEDY = f"an engine made with --weight-bits {SAFE_WEIGHT_BITS} runs on the fast ones"


def saturate(run: Callable[[Array], Array]) -> bool:
    """Whether kernels for unsigned times signed 8-bit numbers lose sums beyond 16 bits. run: the probe, by the backend."""
    y = run(np.full((1, DEPTH), LARGEST, np.float32))
    return bool((y != DEPTH * LARGEST**2).any())


def too_wide(manifest: Manifest, saturates: Callable[[], bool]) -> bool:
    """Whether an engine's 8-bit products do not fit into a backend's kernels on this machine."""
    return manifest.precision == "int8" and manifest.weight_bits > SAFE_WEIGHT_BITS and saturates()
