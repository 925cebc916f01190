// An engine's graphs as sessions of ONNX Runtime.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "enat/enat.hpp"
#include "manifest.hpp"
#include "tensors.hpp"

namespace enat {

enum class Graph { condition, encoder, decoder, sampler, image_decoder };

/// What a device is called: kind and number. Throws InputError.
struct Device {
    bool cuda = false;
    int index = 0;
};
Device parse_device(const std::string& text);

/// The shape of a graph's output beyond its first axis, as the graph says it: -1 for what it leaves open. Nothing where it has no such output.
Shape inner_shape(const Ort::Session& session, const std::string& output);

/// May be used from several threads at once.
class Graphs {
public:
    /// Throws BackendError where ONNX Runtime cannot load a graph or use the device, EngineError where a graph is not of the contract.
    Graphs(const Manifest& manifest, const Options& options);

    /// Runs a graph on inputs in the contract's order → its outputs in the contract's order. Features, modulation and logits stay on the
    /// device; integers and pictures come back to the CPU. Throws BackendError.
    std::vector<Ort::Value> run(Graph graph, const std::vector<const Ort::Value*>& inputs) const;

    /// The values of an output of `run`. A dimension of -1 may be anything. Throws EngineError where it has another type or shape: what
    /// a graph gives is never trusted to be as large as it should.
    template <typename T>
    const T* values(Graph graph, std::size_t output, const Ort::Value& tensor, const Shape& expected) const {
        check(graph, output, tensor, expected);
        return tensor.GetTensorData<T>();
    }

    /// Throws EngineError where an output of `run` has another shape; its elements have the type of the contract.
    void check(Graph graph, std::size_t output, const Ort::Value& tensor, const Shape& expected) const;

    bool on_cpu() const { return on_cpu_; }

    /// F of the contract.
    ONNXTensorElementDataType float_type() const { return float_type_; }

private:
    struct Loaded {
        std::filesystem::path file;
        Ort::Session session{nullptr};
    };

    Loaded load(Graph graph, const Manifest& manifest, const Options& options);

    ONNXTensorElementDataType float_type_;
    bool on_cpu_;
    Ort::Env env_;
    Ort::MemoryInfo host_memory_, device_memory_;
    // mutable: ONNX Runtime's sessions may run in several threads at once, but their Run is not const.
    mutable std::vector<Loaded> graphs_;  // by Graph; the image decoder may be missing
};

}  // namespace enat
