// What ONNX Runtime's TensorRT provider builds a graph for, once: whatever it may be asked. Without it, it builds anew as it meets shapes.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "graphs.hpp"
#include "manifest.hpp"
#include "tensors.hpp"

namespace enat {

constexpr std::int64_t tensorrt_images = 16;  // at once

/// The least, best and largest shapes of a graph's inputs, as the provider reads them: "tokens:1x0,positions:1x0". modulation: shape of
/// the condition's output for encoder and decoder, beyond its first axis. As `general_profile` of the Python runtime.
std::array<std::string, 3> general_profile(const Model& model, Graph graph, const Shape& modulation);

}  // namespace enat
