"""What is kept of an activation while chunks of it stream by, and the ranges that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BINS = 4096
LEVELS = 128  # magnitudes of a symmetric 8-bit number
PERCENTILE = 99.99
LEAST_LIMIT = 2.0**-60  # of a histogram; what is smaller counts as nothing


class Statistic:
    """Streamed: the largest magnitude of every channel, and a histogram of magnitudes whose range doubles when it is exceeded.

    Memory does not grow with what is added. How it was cut into chunks changes nothing but the bins of values at their edges.
    """

    def __init__(self) -> None:
        self.channel_max: NDArray[np.float32] | None = None  # [channels]
        self.counts = np.zeros(BINS, np.int64)
        self.limit = 0.0  # the histogram's upper end: a power of two
        self.values = 0

    def add(self, chunk: Array, channel_axis: int) -> None:
        """A float32 array of any shape; nothing happens where it is empty. Raises ValueError where a value is not finite."""
        if not chunk.size:
            return
        magnitudes = np.abs(chunk)
        channels = magnitudes.max(axis=tuple(axis for axis in range(chunk.ndim) if axis != channel_axis % chunk.ndim))
        top = float(channels.max())
        if not np.isfinite(top):
            raise ValueError("values that are not finite")
        self.channel_max = channels if self.channel_max is None else np.maximum(self.channel_max, channels)
        self.values += chunk.size
        if top > self.limit:
            self.widen(max(2.0 ** np.ceil(np.log2(top)), LEAST_LIMIT))
        if self.limit:
            indices = (magnitudes * np.float32(BINS / self.limit)).astype(np.int32).ravel()
            self.counts += np.bincount(np.minimum(indices, BINS - 1, out=indices), minlength=BINS)
        else:
            self.counts[0] += chunk.size

    def widen(self, limit: float) -> None:
        if self.limit:
            factor = int(limit / self.limit)
            merged = self.counts.reshape(-1, factor).sum(1) if factor <= BINS else np.array([self.counts.sum()])
            self.counts = np.concatenate((merged, np.zeros(BINS - len(merged), np.int64)))
        self.limit = limit

    @property
    def max(self) -> float:
        return 0.0 if self.channel_max is None else float(self.channel_max.max())


def min_max(statistic: Statistic) -> float:
    """The largest magnitude seen."""
    return statistic.max


def percentile(statistic: Statistic, share: float = PERCENTILE) -> float:
    """The magnitude that `share` percent of the values do not exceed."""
    cumulative = np.cumsum(statistic.counts)
    index = int(np.searchsorted(cumulative, share / 100 * cumulative[-1]))
    return min(statistic.max, (index + 1) * statistic.limit / BINS)


def entropy(statistic: Statistic) -> float:
    """The range whose quantized distribution tells most of the original one: least Kullback-Leibler divergence.

    Migacz, "8-bit inference with TensorRT", GTC 2017. Every candidate range has a whole number of bins.
    """
    used = int(np.flatnonzero(statistic.counts)[-1]) + 1 if statistic.values else 0
    if used <= LEVELS:
        return statistic.max
    counts = statistic.counts[:used].astype(np.float64)
    cumulative = np.cumsum(counts)
    best, best_divergence = used, np.inf
    for bins in range(LEVELS, used + 1):
        inside = counts[:bins]
        clipped = inside.copy()
        clipped[-1] += cumulative[-1] - cumulative[bins - 1]
        starts = np.arange(LEVELS) * bins // LEVELS
        filled = inside > 0
        level_sums, level_filled = np.add.reduceat(inside, starts), np.add.reduceat(filled.astype(np.float64), starts)
        level_of_bin = np.repeat(np.arange(LEVELS), np.diff(np.append(starts, bins)))
        spread = np.where(filled, (level_sums / np.maximum(level_filled, 1))[level_of_bin], 0)
        where = clipped > 0
        p, q = clipped[where] / clipped.sum(), spread[where] / max(spread.sum(), 1)
        divergence = float((p * np.log(p / np.maximum(q, 1e-12))).sum())
        if divergence < best_divergence:
            best, best_divergence = bins, divergence
    return min(statistic.max, best * statistic.limit / BINS)


METHODS: dict[str, Callable[[Statistic], float]] = {"minmax": min_max, "percentile": percentile, "entropy": entropy}
