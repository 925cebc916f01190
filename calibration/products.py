"""The products with constant weights: where an engine spends its time, and what is quantized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ..errors import ExportError
from ..graph_file import load
from ..runtime.manifest import Manifest
from ..runtime.schedule import Step

NETWORK = ("encoder", "decoder")
GRAPHS = (*NETWORK, "image_decoder")

Graphs = dict[str, ir.Model]


@dataclass(frozen=True)
class Product:
    """A MatMul or Conv with constant weights: `name` is the layer's in the checkpoint, `input` the value that it multiplies."""

    name: str
    graph: str
    kind: str
    input: str
    output: str
    weights: int  # how many
    quantized: bool
    places: str | int  # how many vectors are multiplied: a field of the schedule's steps, or pixels that are made

    @property
    def channel_axis(self) -> int:
        """The axis of input and output that holds the channels."""
        return 1 if self.kind == "Conv" else -1

    @property
    def weight_axis(self) -> int:
        """The axis of the weights' output channels."""
        return 0 if self.kind == "Conv" else 1


@dataclass(frozen=True)
class Group:
    """Products that share their input, and with it the input's scale."""

    graph: str
    input: str
    products: tuple[Product, ...]

    @property
    def channel_axis(self) -> int:
        return self.products[0].channel_axis

    @property
    def name(self) -> str:
        """Its layers' names, what they have in common said once."""
        parents, leaves = zip(*(product.name.rpartition(".")[::2] for product in self.products), strict=True)
        return self.products[0].name if len(leaves) == 1 else f"{parents[0]}.{{{','.join(leaves)}}}"


def load_graphs(manifest: Manifest, names: Sequence[str] = (*GRAPHS, "condition")) -> Graphs:
    """An engine's graphs; weights stay on the disk until they are read."""
    return {name: load(manifest.path(f"{name}.onnx")) for name in names if manifest.has(f"{name}.onnx")}


def is_product(node: ir.Node) -> bool:
    """Whether a node multiplies with weights, quantized or not."""
    if node.op_type not in ("MatMul", "Conv") or (weight := node.inputs[1]) is None:
        return False
    producer = behind_cast(weight).producer()
    return weight.is_initializer() or (producer is not None and producer.op_type == "DequantizeLinear" and before(weight).is_initializer())


def find_products(graphs: Graphs) -> list[Product]:
    """All products with constant weights of the network and the image decoder. Raises ExportError where they have no names."""
    return [product for graph in GRAPHS if graph in graphs for node in graphs[graph].graph if (product := as_product(graph, node))]


def as_product(graph: str, node: ir.Node) -> Product | None:
    if not is_product(node):
        return None
    value, weight = node.inputs[:2]
    assert value is not None and weight is not None
    if behind_cast(weight).name != f"{node.name}.weight":
        raise ExportError(f"{graph}.onnx: its layers have no names: it was made by an older enat; export the checkpoint again")
    if quantized := not weight.is_initializer():
        weight, value = before(weight), before(before(value))
    result = node.outputs[0]
    assert weight.const_value is not None and value.shape is not None and result.shape is not None
    places = math.prod(fixed(dim) for dim in result.shape[2:]) if node.op_type == "Conv" else str(value.shape[1])
    return Product(str(node.name), graph, node.op_type, str(value.name), str(result.name), weight.const_value.size, quantized, places)


def fixed(dim: int | ir.SymbolicDim) -> int:
    if not isinstance(dim, int):
        raise ExportError(f"expected a fixed size, got {dim}")
    return dim


def before(value: ir.Value) -> ir.Value:
    """What a value was quantized or dequantized from."""
    producer = behind_cast(value).producer()
    assert producer is not None and producer.inputs[0] is not None
    return behind_cast(producer.inputs[0])


def behind_cast(value: ir.Value) -> ir.Value:
    """The value itself, or what it was cast from."""
    producer = value.producer()
    return producer.inputs[0] if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None else value


def find_groups(products: Sequence[Product]) -> list[Group]:
    together: dict[tuple[str, str], list[Product]] = {}
    for product in products:
        together.setdefault((product.graph, product.input), []).append(product)
    return [Group(graph, name, tuple(members)) for (graph, name), members in together.items()]


def multiply_adds(product: Product, steps: Sequence[Step]) -> int:
    """How many multiply-adds a product does for one picture; from the second step on the network has two rows an image."""
    if isinstance(product.places, int):
        return product.places * product.weights  # every pixel that a convolution makes
    guided = any(step.guidance > 0 for step in steps)
    rows = [2 if guided and step.index > 0 else 1 for step in steps]
    return sum(n * int(getattr(step, product.places)) for n, step in zip(rows, steps, strict=True)) * product.weights


def int8_share(products: Sequence[Product], steps: Sequence[Step]) -> float:
    """The share of the multiply-adds with constant weights that are done in 8 bits."""
    total = sum(multiply_adds(product, steps) for product in products)
    return sum(multiply_adds(product, steps) for product in products if product.quantized) / total
