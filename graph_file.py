"""Graphs as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from .errors import EngineError
from .runtime.files import is_inside

EXTERNAL_DATA_FROM = 64 * 2**20  # bytes of weights; smaller graphs hold theirs


def load(path: Path, data_in: Path | None = None) -> ir.Model:
    """Reads a graph; large weights stay on the disk until they are read. data_in: the folder that they lie in, where it is not the graph's.

    Raises EngineError where they would lie elsewhere. That is checked here: onnx-ir refuses files of several names (hard links) too, as
    an engine has that shares them with a model repository.
    """
    model = ir.load(path)
    folder = (data_in or path.parent).absolute()
    for value, tensor in external_data(model):
        file = folder / tensor.location
        if not is_inside(file, folder):
            raise EngineError(f"{path}: its weights {tensor.name} lie outside its folder, in {file}")
        value.const_value = moved(tensor, file)
    return model


def save(model: ir.Model, path: Path) -> None:
    """Writes a graph, large weights beside it in one file of its name with `.data` behind."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size < EXTERNAL_DATA_FROM:
        ir.external_data.load_to_model(model)  # what was read lazily from another file
        ir.save(model, path)
    else:
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)


def save_without_data(model: ir.Model, path: Path, data_in: Path) -> None:
    """Writes a graph whose large weights stay where they are, in files of `data_in`, which it names as if it lay there."""
    for value, tensor in external_data(model):
        value.const_value = moved(tensor, Path(tensor.location).relative_to(data_in.absolute()))
    ir.save(model, path)


def external_data(model: ir.Model) -> Iterator[tuple[ir.Value, ir.ExternalTensor]]:
    """The weights that lie in other files."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value, value.const_value


def moved(tensor: ir.ExternalTensor, location: Path) -> ir.ExternalTensor:
    """A tensor of the same bytes in another file, or in that one by another name."""
    return ir.ExternalTensor(str(location), tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name or "")
