"""Random numbers that are a function of (seed, step, position) alone: the same in every batch, backend and language.

Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HIGH = np.uint64(32)
ROUNDS = 10
AT_ONCE = 2**15  # numbers: of fewer NumPy's calls cost more than the arithmetic, more take memory

Words = NDArray[np.uint64]  # 32-bit words, each in 64 bits so that products keep their upper half


def philox4x32(counter: Sequence[Words], key: Sequence[Words]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 on four counter words and two key words, broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_ in range(ROUNDS):
        if round_:
            k0, k1 = (k0 + np.uint64(WEYL[0])) & LOW, (k1 + np.uint64(WEYL[1])) & LOW
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (second >> HIGH) ^ c1 ^ k0, second & LOW, (first >> HIGH) ^ c3 ^ k1, first & LOW
    return c0, c1, c2, c3


def noise(seeds: Sequence[int], steps: Sequence[int], length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The noise of a batch's steps, for images with these seeds.

    Returns (choice_noise, confidence_noise), float32 [steps, batch, length] each, indexed by position:
    u = (r0 >> 8)·2⁻²⁴ in [0, 1), and the standard Gumbel −ln(−ln(((r1 >> 9) + 0.5)·2⁻²³)), computed in float64.
    """
    seed = np.array(seeds, np.uint64)[:, None]
    positions = np.arange(length, dtype=np.uint64)
    zero = np.zeros((), np.uint64)
    choice, confidence = np.empty((2, len(steps), len(seeds), length), np.float32)
    together = max(1, AT_ONCE // max(1, len(seeds) * length))
    for first in range(0, len(steps), together):
        some = slice(first, first + together)
        step = np.array(steps[some], np.uint64)[:, None, None]
        r0, r1, _, _ = philox4x32((positions, step, zero, zero), (seed & LOW, seed >> HIGH))
        choice[some] = (r0 >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
        confidence[some] = -np.log(-np.log(((r1 >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23))
    return choice, confidence
