"""The graphs that are written down rather than traced: the condition's look-up, the sampler, and a probe of int8 kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
from numpy.typing import NDArray

from ..calibration.quantize import INPUT_LIMIT, ZERO_POINT, constant, describe

OPSET = 20
IR_VERSION = 10


def condition_graph(encoder_table: NDArray[Any], decoder_table: NDArray[Any]) -> ir.Model:
    """labels [rows] → each table's rows: encoder_modulation, decoder_modulation [rows, …]."""
    labels = ir.Value(name="labels", shape=ir.Shape(["rows"]), type=ir.TensorType(ir.DataType.INT64))
    tables, nodes, outputs = [], [], []
    for name, table in (("encoder_modulation", encoder_table), ("decoder_modulation", decoder_table)):
        tensor = ir.tensor(table, name=f"{name}_table")
        stored = ir.Value(name=tensor.name, shape=ir.Shape(table.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        output = ir.Value(name=name, shape=ir.Shape(["rows", *table.shape[1:]]), type=ir.TensorType(tensor.dtype))
        nodes.append(ir.Node("", "Gather", [stored, labels], outputs=[output]))
        tables.append(stored)
        outputs.append(output)
    graph = ir.Graph([labels], outputs, nodes=nodes, initializers=tables, opset_imports={"": OPSET}, name="condition")
    return ir.Model(graph, ir_version=IR_VERSION)


# One step's choice of tokens, and of the positions to reveal. Chang et al., "MaskGIT", 2022; guidance: Ho and Salimans, 2022.
# The smallest k with S[k] > u·S[codes − 1] is how many S[k] are not greater, since S, a cumulative sum, never falls.
SAMPLER = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
sampler (
  float[rows, masked, {codes}] logits, int64[batch, masked] positions,
  float[batch, {length}] choice_noise, float[batch, {length}] confidence_noise,
  float guidance, float sampling_temperature, float mask_temperature, int64 keep
) => (
  int64[batch, masked] tokens, int64[batch, revealed] revealed_tokens, int64[batch, revealed] revealed_positions,
  int64[batch, keep] masked_positions
)
<int64[1] axis_0 = {{0}}, int64[1] axis_1 = {{1}}, int64[1] axis_2 = {{2}}, int64 codes_axis = {{2}},
 int64[1] last = {{-1}}, int64[1] end = {{{codes}}}>
{{
  batch = Shape <start = 0, end = 1> (positions)
  rows = Shape <start = 0, end = 1> (logits)
  masked = Shape <start = 1, end = 2> (positions)
  first_unconditional = Sub (rows, batch)
  conditional = Slice (logits, axis_0, batch, axis_0)
  unconditional = Slice (logits, first_unconditional, rows, axis_0)
  direction = Sub (conditional, unconditional)
  guided_direction = Mul (guidance, direction)
  guided = Add (conditional, guided_direction)
  logp = LogSoftmax <axis = -1> (guided)
  tempered = Div (logp, sampling_temperature)
  probability = Softmax <axis = -1> (tempered)
  cumulative = CumSum (probability, codes_axis)
  total = Slice (cumulative, last, end, axis_2)
  drawn_flat = GatherElements <axis = 1> (choice_noise, positions)
  drawn = Unsqueeze (drawn_flat, axis_2)
  threshold = Mul (drawn, total)
  passed = LessOrEqual (cumulative, threshold)
  passed_count = Cast <to = 6> (passed)
  chosen_count = ReduceSum <keepdims = 1> (passed_count, axis_2)
  chosen = Cast <to = 7> (chosen_count)
  tokens = Squeeze (chosen, axis_2)
  chosen_logp = GatherElements <axis = 2> (logp, chosen)
  likelihood = Squeeze (chosen_logp, axis_2)
  gumbel = GatherElements <axis = 1> (confidence_noise, positions)
  scaled_gumbel = Mul (mask_temperature, gumbel)
  confidence = Add (likelihood, scaled_gumbel)
  sorted_confidence, order = TopK <axis = 1, largest = 1, sorted = 1> (confidence, masked)
  revealed_count = Sub (masked, keep)
  revealed = Slice (order, axis_0, revealed_count, axis_1)
  kept = Slice (order, revealed_count, masked, axis_1)
  revealed_tokens = GatherElements <axis = 1> (tokens, revealed)
  revealed_positions = GatherElements <axis = 1> (positions, revealed)
  masked_positions = GatherElements <axis = 1> (positions, kept)
}}
"""


def sampler_graph(length: int, codes: int) -> ir.Model:
    """The sampler for images of `length` tokens out of `codes`; inputs and outputs as in the engine contract."""
    text = SAMPLER.format(ir_version=IR_VERSION, opset=OPSET, length=length, codes=codes)
    return ir.from_proto(onnx.parser.parse_model(text))


def int8_probe() -> ir.Model:
    """A product as the quantized graphs have them, of the largest numbers there are: x [1, 64] → y [1, 16].

    For x = 127 every y is 64·127². Kernels that add pairs of products in 16 bits (u8·s8 without VNNI) saturate and give less. The
    runtime keeps it as a file, as it cannot write graphs: `runtime/backends/int8_probe.onnx`.
    """
    depth, width = 64, 16
    x = ir.Value(name="x", shape=ir.Shape([1, depth]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": OPSET}, name="int8_probe")
    scale, zero = constant(graph, "scale", np.float32(1)), constant(graph, "zero_point", np.uint8(ZERO_POINT))
    weights = constant(graph, "weights", np.full((depth, width), INPUT_LIMIT, np.int8))
    weight_scales = constant(graph, "weight_scales", np.ones(width, np.float32))
    q = ir.node("QuantizeLinear", [x, scale, zero])
    dq = ir.node("DequantizeLinear", [q.outputs[0], scale, zero])
    weight_dq = ir.node("DequantizeLinear", [weights, weight_scales], {"axis": 1})
    product = ir.node("MatMul", [dq.outputs[0], weight_dq.outputs[0]])
    describe(product, "y", ir.Shape([1, width]), ir.DataType.FLOAT)
    graph.extend([q, dq, weight_dq, product])
    graph.outputs.append(product.outputs[0])
    return ir.Model(graph, ir_version=IR_VERSION)
