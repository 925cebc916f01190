"""Graphs as files."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

EXTERNAL_DATA_FROM = 64 * 2**20  # bytes of weights; smaller graphs hold theirs


def save(model: ir.Model, path: Path) -> None:
    """Writes a graph, large weights beside it in one file of its name with `.data` behind."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size < EXTERNAL_DATA_FROM:
        ir.external_data.load_to_model(model)  # what was read lazily from another file
        ir.save(model, path)
    else:
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
