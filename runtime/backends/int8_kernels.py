"""Whether a backend's kernels for 8-bit numbers add rightly on this machine: tried, not looked up by the CPU's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import Array

SAFE_WEIGHT_BITS = 7
PROBE = Path(__file__).parent / "int8_probe.onnx"  # x [1, 64] → y [1, 16]: a product with weights of 127
DEPTH, LARGEST = 64, 127

OVERFLOW = "this CPU's fast int8 kernels overflow (it has no VNNI)"


def saturate(run: Callable[[Array], Array]) -> bool:
    """Whether kernels for unsigned times signed 8-bit numbers lose sums beyond 16 bits. run: the probe, by the backend."""
    y = run(np.full((1, DEPTH), LARGEST, np.float32))
    return bool((y != DEPTH * LARGEST**2).any())
