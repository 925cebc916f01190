"""What ONNX Runtime's CUDA provider has kernels for, as far as engines use it: whatever it lacks runs on the CPU, between two copies.

From ONNX Runtime's docs/OperatorKernels.md, CUDAExecutionProvider, the rows for opset 20.
"""

from __future__ import annotations

FLOATS = {"FLOAT", "FLOAT16"}
NUMBERS = {*FLOATS, "INT32", "INT64"}
BYTES = {"INT8", "UINT8"}
COUNTED = {*NUMBERS, *BYTES}
ANY = {*COUNTED, "BOOL"}

KERNELS = {
    **dict.fromkeys(("Add", "Div", "Mul", "Sub"), COUNTED),
    **dict.fromkeys(("CumSum", "LessOrEqual", "Min", "Pow", "ReduceSum", "TopK"), NUMBERS),
    **dict.fromkeys(("ArgMin", "AveragePool", "Conv", "DepthToSpace", "Floor", "Gelu", "InstanceNormalization"), FLOATS),
    **dict.fromkeys(("LayerNormalization", "LogSoftmax", "MatMul", "QuantizeLinear", "Sigmoid", "Softmax"), FLOATS),
    **dict.fromkeys(("Cast", "Concat", "Expand", "Gather", "GatherElements", "Reshape", "ScatterElements", "Shape"), ANY),
    **dict.fromkeys(("Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"), ANY),
    "Clip": {*FLOATS, *BYTES, "INT64"},
    "DequantizeLinear": BYTES,
}
