// Tensors of ONNX Runtime in the CPU's memory.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace enat {

using Shape = std::vector<std::int64_t>;

/// A tensor without values: a dimension is 0.
inline Ort::Value empty_tensor(const Shape& shape, ONNXTensorElementDataType type) {
    Ort::AllocatorWithDefaultOptions allocator;
    return Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), type);
}

/// A tensor with a copy of the values, as many as the shape says.
template <typename T>
Ort::Value tensor(const Shape& shape, const std::vector<T>& values) {
    Ort::AllocatorWithDefaultOptions allocator;
    Ort::Value result = Ort::Value::CreateTensor<T>(allocator, shape.data(), shape.size());
    std::copy(values.begin(), values.end(), result.template GetTensorMutableData<T>());
    return result;
}

/// A number.
template <typename T>
Ort::Value scalar(T value) {
    return tensor<T>({}, std::vector<T>{value});
}

/// The first `rows` entries along axis 0 of a tensor of the engine's float type, wherever it is: a view, valid as long as the tensor.
inline Ort::Value first_rows(Ort::Value& whole, std::int64_t rows) {
    const auto info = whole.GetTensorTypeAndShapeInfo();
    Shape shape = info.GetShape();
    const std::size_t width = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? 2 : 4;
    const std::size_t bytes = info.GetElementCount() / static_cast<std::size_t>(shape[0]) * static_cast<std::size_t>(rows) * width;
    shape[0] = rows;
    return Ort::Value::CreateTensor(whole.GetTensorMemoryInfo(), whole.GetTensorMutableRawData(), bytes, shape.data(), shape.size(),
                                    info.GetElementType());
}

}  // namespace enat
