"""Lanes whose tensors are NumPy arrays, for backends that compute where they lie."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from . import Array, Program


class NumpyLane:
    """All of a lane but `run`."""

    records = False

    def upload(self, array: Array) -> Array:
        return array

    def download(self, tensor: Array) -> Array:
        return tensor

    def first_rows(self, tensor: Array, rows: int) -> Array:
        return tensor[:rows]

    def concatenate(self, tensors: Sequence[Array]) -> Array:
        return np.concatenate(tensors, axis=1)

    def compute(self, key: Hashable | None, arrays: Mapping[str, Array], program: Program) -> list[Array]:
        return list(program(arrays))
