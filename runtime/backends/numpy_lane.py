"""Lanes whose tensors are NumPy arrays, for backends that compute where they lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from ...errors import BackendError
from . import Array, Program

SHORT_OF_MEMORY = ("allocate memory", "bad_alloc", "cpu_memory.cpp")  # in the words of ONNX Runtime, C++ and OpenVINO


class NumpyLane(ABC):
    """All of a lane but how a graph is run."""

    records = False
    dry = False
    # A picture's features in the image decoder fill a CPU's caches, and several pictures' a lot of memory.
    pictures_at_once: Mapping[str, int] = MappingProxyType({"image_decoder": 1, "image_encoder": 1})

    @abstractmethod
    def run_once(self, graph: str, inputs: Mapping[str, Array]) -> Sequence[Array]:
        """Runs a graph on all of its inputs."""

    def run(self, graph: str, inputs: Mapping[str, Array]) -> Sequence[Array]:
        size = self.pictures_at_once.get(graph)
        batch = min(len(array) for array in inputs.values()) if size else 1
        if not size or batch <= size:
            return self.run_once(graph, inputs)
        pieces = [slice(start, start + size) for start in range(0, batch, size)]
        runs = [self.run_once(graph, {name: pictures(array, batch, piece) for name, array in inputs.items()}) for piece in pieces]
        counts = [len(range(batch)[piece]) for piece in pieces]
        return [joined(parts, counts) for parts in zip(*runs, strict=True)]

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


def failure(graph: str, backend: str, error: Exception, why: str) -> BackendError:
    """What to raise where a backend failed to run a graph; why: in its own words."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in SHORT_OF_MEMORY):
        return BackendError(f"{graph}.onnx: not enough memory for so many pictures at once; choose a smaller batch size")
    return BackendError(f"{graph}.onnx: {backend} failed: {why}")


def pictures(array: Array, batch: int, chosen: slice) -> Array:
    """Some pictures' rows: the first `batch` rows are one of each picture, and so are those of each further branch of the guidance."""
    branches = array.reshape(len(array) // batch, batch, *array.shape[1:])[:, chosen]
    return branches.reshape(branches.shape[0] * branches.shape[1], *array.shape[1:])


def joined(parts: Sequence[Array], counts: Sequence[int]) -> Array:
    """The inverse, of as many pictures each."""
    branches = [part.reshape(len(part) // count, count, *part.shape[1:]) for part, count in zip(parts, counts, strict=True)]
    whole = np.concatenate(branches, axis=1)
    return whole.reshape(whole.shape[0] * whole.shape[1], *whole.shape[2:])
