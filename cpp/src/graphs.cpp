#include "graphs.hpp"

#include <cstdlib>
#include <future>
#include <iterator>
#include <map>
#include <system_error>
#include <utility>

#include "execution_providers.hpp"
#include "messages.hpp"

namespace enat {

namespace {

enum class Type { integer, float32, engine, byte };  // engine: the engine's float type

struct Port {
    const char* name;
    Type type;
};

struct Contract {
    const char* file;
    std::vector<Port> inputs, outputs;
};

/// The table of docs/ENGINE.md, in the order of Graph.
const Contract& contract(Graph graph) {
    static const std::vector<Contract> contracts = {
        {"condition.onnx", {{"labels", Type::integer}}, {{"encoder_modulation", Type::engine}, {"decoder_modulation", Type::engine}}},
        {"encoder.onnx",
         {{"tokens", Type::integer}, {"positions", Type::integer}, {"features", Type::engine}, {"encoder_modulation", Type::engine}},
         {{"visible_features", Type::engine}}},
        {"decoder.onnx",
         {{"positions", Type::integer}, {"features", Type::engine}, {"decoder_modulation", Type::engine}},
         {{"logits", Type::float32}}},
        {"sampler.onnx",
         {{"logits", Type::float32},
          {"positions", Type::integer},
          {"choice_noise", Type::float32},
          {"confidence_noise", Type::float32},
          {"guidance", Type::float32},
          {"sampling_temperature", Type::float32},
          {"mask_temperature", Type::float32},
          {"keep", Type::integer}},
         {{"tokens", Type::integer},
          {"revealed_tokens", Type::integer},
          {"revealed_positions", Type::integer},
          {"masked_positions", Type::integer}}},
        {"image_decoder.onnx", {{"tokens", Type::integer}, {"positions", Type::integer}}, {{"images", Type::byte}}},
    };
    return contracts[static_cast<std::size_t>(graph)];
}

ONNXTensorElementDataType element_type(Type type, ONNXTensorElementDataType engine) {
    switch (type) {
        case Type::integer: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
        case Type::float32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        case Type::byte: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
        case Type::engine: break;
    }
    return engine;
}

/// As ONNX calls it.
const char* type_name(ONNXTensorElementDataType type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return "float";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return "bfloat16";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE: return "double";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return "uint8";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return "int8";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return "int32";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return "int64";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL: return "bool";
        default: return "another type";
    }
}

bool stays_on_device(Type type) { return type == Type::engine || type == Type::float32; }

Ort::Env make_env() {
    // It tells its makers how it is used, unless told otherwise before it starts.
    setenv("ORT_DISABLE_TELEMETRY", "1", 0);
    // Asked before anything else is: every other call goes through what this gives.
    if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr) {
        throw BackendError(runtime_version() + " is older than the headers (version 1." + std::to_string(ORT_API_VERSION) +
                           ") that this library was built with");
    }
    return Ort::Env(ORT_LOGGING_LEVEL_FATAL, "enat");  // what it would log as errors, exceptions tell
}

/// Throws EngineError unless a graph's inputs or outputs hold those of the contract, in their types. Inputs must be no more than those.
void check_ports(const std::filesystem::path& file, const char* kind, const std::vector<Port>& expected, bool exactly,
                 const std::map<std::string, ONNXTensorElementDataType>& found, ONNXTensorElementDataType engine) {
    for (const Port& port : expected) {
        const auto entry = found.find(port.name);
        if (entry == found.end()) throw EngineError(shown(file) + ": it has no " + kind + " " + port.name);
        if (entry->second != element_type(port.type, engine)) {
            throw EngineError(shown(file) + ": its " + kind + " " + port.name + " is " + type_name(entry->second) + ", expected " +
                              type_name(element_type(port.type, engine)));
        }
    }
    if (exactly && found.size() != expected.size()) {
        throw EngineError(shown(file) + ": it has " + std::to_string(found.size()) + " " + kind + "s, expected " +
                          std::to_string(expected.size()));
    }
}

ONNXTensorElementDataType element_type(const Ort::TypeInfo& info) {
    // Of a sequence or an optional value there is no tensor's information: asking for its element type would crash.
    if (info.GetONNXType() != ONNX_TYPE_TENSOR) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    return info.GetTensorTypeAndShapeInfo().GetElementType();
}

std::string shown(const Shape& shape) {
    std::string text;
    for (const std::int64_t size : shape) text += (text.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
    return "[" + text + "]";
}

}  // namespace

Shape inner_shape(const Ort::Session& session, const std::string& output) {
    Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t i = 0; i < session.GetOutputCount(); ++i) {
        if (session.GetOutputNameAllocated(i, allocator).get() != output) continue;
        const Ort::TypeInfo info = session.GetOutputTypeInfo(i);
        const Shape shape = info.GetTensorTypeAndShapeInfo().GetShape();
        return shape.empty() ? shape : Shape(shape.begin() + 1, shape.end());
    }
    return {};
}

Graphs::Graphs(const Manifest& manifest, const Options& options)
    : float_type_(manifest.float_type == "float16" ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT),
      on_cpu_(!parse_device(options.device).cuda),
      env_(make_env()),
      host_memory_(Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault)),
      device_memory_(nullptr) {
    const Device device = parse_device(options.device);
    device_memory_ = device.cuda ? Ort::MemoryInfo("Cuda", OrtDeviceAllocator, device.index, OrtMemTypeDefault)
                                 : Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    std::vector<Graph> wanted = {Graph::condition, Graph::encoder, Graph::decoder, Graph::sampler};
    if (manifest.has(contract(Graph::image_decoder).file)) wanted.push_back(Graph::image_decoder);
    // On the CPU all at once: loading is the larger part of a short run. On a GPU one after the other, the condition first, of which the
    // others' sessions may want to know what it gives.
    const auto policy = device.cuda ? std::launch::deferred : std::launch::async;
    std::vector<std::future<Loaded>> loading;
    for (const Graph graph : wanted) {
        const auto work = [&, graph] { return load(graph, manifest, options); };
        try {
            loading.push_back(std::async(policy, work));
        } catch (const std::system_error&) {  // no thread to be had: one after the other
            loading.push_back(std::async(std::launch::deferred, work));
        }
    }
    for (auto& graph : loading) graphs_.push_back(graph.get());
}

Graphs::Loaded Graphs::load(Graph graph, const Manifest& manifest, const Options& options) {
    const Contract& expected = contract(graph);
    Loaded loaded;
    loaded.file = manifest.folder / expected.file;  // for messages
    Shape modulation;
    if (!on_cpu_ && (graph == Graph::encoder || graph == Graph::decoder)) {
        modulation = inner_shape(graphs_.front().session, expected.inputs.back().name);  // the condition's, under the same name
    }
    const Ort::SessionOptions session_options = make_session_options(env_, manifest, options, graph, modulation);
    std::map<std::string, ONNXTensorElementDataType> inputs, outputs;
    try {
        loaded.session = Ort::Session(env_, (manifest.root / expected.file).c_str(), session_options);
        Ort::AllocatorWithDefaultOptions allocator;
        for (std::size_t i = 0; i < loaded.session.GetInputCount(); ++i) {
            inputs[loaded.session.GetInputNameAllocated(i, allocator).get()] = element_type(loaded.session.GetInputTypeInfo(i));
        }
        for (std::size_t i = 0; i < loaded.session.GetOutputCount(); ++i) {
            outputs[loaded.session.GetOutputNameAllocated(i, allocator).get()] = element_type(loaded.session.GetOutputTypeInfo(i));
        }
    } catch (const std::exception& error) {  // ONNX Runtime's, and what its libraries throw
        throw BackendError(enat::shown(loaded.file) + ": " + runtime_version() + " cannot load it: " + first_line(error.what()));
    }
    check_ports(loaded.file, "input", expected.inputs, true, inputs, float_type_);
    check_ports(loaded.file, "output", expected.outputs, false, outputs, float_type_);
    return loaded;
}

std::vector<Ort::Value> Graphs::run(Graph graph, const std::vector<const Ort::Value*>& inputs) const {
    const Contract& expected = contract(graph);
    Loaded& loaded = graphs_[static_cast<std::size_t>(graph)];
    try {
        Ort::IoBinding binding(loaded.session);
        for (std::size_t i = 0; i < inputs.size(); ++i) binding.BindInput(expected.inputs[i].name, *inputs[i]);
        for (const Port& output : expected.outputs) {
            binding.BindOutput(output.name, stays_on_device(output.type) ? device_memory_ : host_memory_);
        }
        loaded.session.Run(Ort::RunOptions{nullptr}, binding);
        return binding.GetOutputValues();
    } catch (const Ort::Exception& error) {
        throw BackendError(enat::shown(loaded.file) + ": ONNX Runtime failed: " + first_line(error.what()));
    }
}

void Graphs::check(Graph graph, std::size_t output, const Ort::Value& tensor, const Shape& expected) const {
    const auto info = tensor.GetTensorTypeAndShapeInfo();
    const Shape shape = info.GetShape();
    bool same = shape.size() == expected.size();
    for (std::size_t i = 0; same && i < shape.size(); ++i) same = expected[i] < 0 || shape[i] == expected[i];
    const Port& port = contract(graph).outputs[output];
    if (!same || info.GetElementType() != element_type(port.type, float_type_)) {
        throw EngineError(enat::shown(graphs_[static_cast<std::size_t>(graph)].file) + ": it gave " + port.name + " of shape " +
                          shown(shape) + ", expected " + shown(expected));
    }
}

}  // namespace enat
