"""PyTorch modules traced into ONNX graphs with the contract's names and dynamic dimensions."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..calibration.products import is_product
from ..calibration.quantize import own
from .tables import IR_VERSION, OPSET
from .tidy import join_slices, shuffle_whole_channels, spell_out_shapes


@dataclass(frozen=True)
class Port:
    """An input or output of a graph: its name, and a name or a fixed size for every dimension."""

    name: str
    dims: tuple[str | int, ...]


def trace(module: nn.Module, example: Mapping[str, Tensor], inputs: Sequence[Port], outputs: Sequence[Port]) -> ir.Model:
    """Traces `module` with torch.onnx: every named dimension of `inputs` is free at run time, 0 included.

    example: the inputs in order; every named dimension at least 2, since smaller ones are taken for constants.
    """
    names = {dim for port in inputs for dim in port.dims if isinstance(dim, str)}
    free = {name: torch.export.Dim(name) for name in names}
    shapes = tuple({i: free[dim] for i, dim in enumerate(port.dims) if isinstance(dim, str)} for port in inputs)
    with quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(example.values()),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=[port.name for port in inputs],
            output_names=[port.name for port in outputs],
        )
    assert program is not None
    model = program.model
    model.ir_version = IR_VERSION
    for value, port in zip((*model.graph.inputs, *model.graph.outputs), (*inputs, *outputs), strict=True):
        value.shape = ir.Shape(port.dims)
    spell_out_shapes(model)
    join_slices(model)
    shuffle_whole_channels(model)
    name_weights(model)
    strip(model)
    return model


def name_weights(model: ir.Model) -> None:
    """Gives every product with constant weights its module's name, and its weights that name with `.weight` behind.

    Layers are called by these names wherever precision is chosen: `blocks.3.attn.q`, `decoder.conv_in`.
    """
    for value in list(model.graph.initializers.values()):
        value.name = without_root(value.name or "")
    for node in model.graph:
        if is_product(node) and (weight := node.inputs[1]) is not None:
            *_, module, _ = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])
            node.name = without_root(module)
            if sum(is_product(user) for user, _ in weight.uses()) > 1:
                weight = own(model.graph, node, 1)
            weight.name = f"{node.name}.weight"


def without_root(name: str) -> str:
    """The name inside the network or the tokenizer, which a graph's module holds."""
    return name.removeprefix("network.").removeprefix("tokenizer.")


def strip(model: ir.Model) -> None:
    """Takes out what tells of the machine that the graph was traced on (source files, stack traces)."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "enat", None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporter's own progress and its warnings about names off the terminal."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)
