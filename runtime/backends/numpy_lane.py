"""Lanes whose tensors are NumPy arrays, for backends that compute where they lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from . import Array, Program


class NumpyLane(ABC):
    """All of a lane but how a graph is run."""

    records = False
    dry = False

    @abstractmethod
    def run_once(self, graph: str, inputs: Mapping[str, Array]) -> Sequence[Array]:
        """Runs a graph on all of its inputs."""

    def run(self, graph: str, inputs: Mapping[str, Array]) -> Sequence[Array]:
        count = len(next(iter(inputs.values())))
        if graph not in ("image_decoder", "image_encoder") or count < 2:
            return self.run_once(graph, inputs)
        # Pictures one by one: a picture's features fill a CPU's caches, and several pictures' a lot of memory.
        pictures = [self.run_once(graph, {name: array[i : i + 1] for name, array in inputs.items()}) for i in range(count)]
        return [np.concatenate(parts) for parts in zip(*pictures, strict=True)]

    def enter(self) -> None:  # noqa: B027
        """Any thread may use it."""

    def close(self) -> None:  # noqa: B027
        """It holds nothing."""

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
