#include "execution_providers.hpp"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cache_folder.hpp"
#include "cores.hpp"
#include "int8_probe.hpp"
#include "messages.hpp"
#include "profiles.hpp"

namespace enat {

namespace {

constexpr std::int64_t safe_weight_bits = 7;
constexpr std::int64_t cached_features = std::int64_t{1} << 19;  // 2 MB of float32 a core, of one of the tensors that tokens have

using Pairs = std::vector<std::pair<std::string, std::string>>;

/// Whether this machine's kernels for unsigned times signed 8-bit numbers lose sums beyond 16 bits: tried, not looked up. The probe is
/// that of the Python runtime: a product of ones, whose sums are exact where nothing is lost.
bool int8_saturates(Ort::Env& env) {
    static const bool saturates = [&env] {
        Ort::SessionOptions options;
        options.SetIntraOpNumThreads(1);
        Ort::Session session(env, int8_probe, sizeof int8_probe, options);
        Ort::AllocatorWithDefaultOptions allocator;
        const auto input_name = session.GetInputNameAllocated(0, allocator), output_name = session.GetOutputNameAllocated(0, allocator);
        const Shape shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
        const auto size = static_cast<std::size_t>(shape.at(0) * shape.at(1));
        const Ort::Value input = tensor(shape, std::vector<float>(size, 127.0f));
        const char *inputs[] = {input_name.get()}, *outputs[] = {output_name.get()};
        const auto result = session.Run(Ort::RunOptions{nullptr}, inputs, &input, 1, outputs, 1);
        const float* sums = result[0].GetTensorData<float>();
        const float exact = static_cast<float>(shape[1]) * 127 * 127;
        return std::any_of(sums, sums + result[0].GetTensorTypeAndShapeInfo().GetElementCount(), [&](float sum) { return sum != exact; });
    }();
    return saturates;
}

/// How many threads an engine's graphs may use together: as asked for, else as the process may use; 0 where nothing limits it.
int threads_allowed(const Options& options) { return options.threads ? options.threads : allowed_threads(); }

/// How many they use.
int threads_used(const Options& options) {
    const int allowed = threads_allowed(options);
    return allowed ? allowed : machine_cores();
}

/// Threads of a session, which counts one that runs it among them: all that run it and those of its own are to be as many as the graphs
/// use. 0: as ONNX Runtime chooses for one.
int session_threads(const Options& options) {
    return options.slots == 1 ? threads_allowed(options) : std::max(1, threads_used(options) - options.slots + 1);
}

/// Calls an `Update…ProviderOptions` of ONNX Runtime.
template <typename Update, typename Handle>
void update(Update function, Handle* handle, const Pairs& pairs) {
    std::vector<const char*> keys, values;
    for (const auto& [key, value] : pairs) {
        keys.push_back(key.c_str());
        values.push_back(value.c_str());
    }
    Ort::ThrowOnError(function(handle, keys.data(), values.data(), keys.size()));
}

void append_cuda(Ort::SessionOptions& session, int index) {
    const OrtApi& api = Ort::GetApi();
    OrtCUDAProviderOptionsV2* created = nullptr;
    Ort::ThrowOnError(api.CreateCUDAProviderOptions(&created));
    const std::unique_ptr<OrtCUDAProviderOptionsV2, decltype(api.ReleaseCUDAProviderOptions)> cuda(created, api.ReleaseCUDAProviderOptions);
    // TF32 keeps 10 bits of a float32's 23: a float32 engine would not give what it gives on a CPU. By default ONNX Runtime takes twice the
    // memory that it has, and times all of cuDNN's algorithms for every new shape.
    update(api.UpdateCUDAProviderOptions, cuda.get(),
           {{"device_id", std::to_string(index)},
            {"use_tf32", "0"},
            {"arena_extend_strategy", "kSameAsRequested"},
            {"cudnn_conv_algo_search", "HEURISTIC"}});
    session.AppendExecutionProvider_CUDA_V2(*cuda);
}

void append_tensorrt(Ort::SessionOptions& session, int index, const Manifest& manifest, Graph graph, const Shape& modulation) {
    const OrtApi& api = Ort::GetApi();
    OrtTensorRTProviderOptionsV2* created = nullptr;
    Ort::ThrowOnError(api.CreateTensorRTProviderOptions(&created));
    const std::unique_ptr<OrtTensorRTProviderOptionsV2, decltype(api.ReleaseTensorRTProviderOptions)> tensorrt(
        created, api.ReleaseTensorRTProviderOptions);
    const std::string kind = "onnxruntime-tensorrt-" + std::to_string(tensorrt_images);
    const std::string folder = cache_folder(manifest.hash, kind).string(), kept = folder.empty() ? "0" : "1";
    const std::string half = manifest.float_type == "float16" ? "1" : "0";
    const auto [least, best, most] = general_profile(manifest.model, graph, modulation);
    update(api.UpdateTensorRTProviderOptions, tensorrt.get(),
           {{"device_id", std::to_string(index)},
            {"trt_fp16_enable", half},
            {"trt_layer_norm_fp32_fallback", half},
            {"trt_engine_cache_enable", kept},
            {"trt_engine_cache_path", folder},
            {"trt_timing_cache_enable", kept},
            {"trt_timing_cache_path", folder},
            {"trt_profile_min_shapes", least},
            {"trt_profile_opt_shapes", best},
            {"trt_profile_max_shapes", most}});
    session.AppendExecutionProvider_TensorRT_V2(*tensorrt);
}

}  // namespace

Device parse_device(const std::string& text) {
    if (text == "cpu") return {};
    if (text == "cuda") return {true, 0};
    const std::string digits = text.rfind("cuda:", 0) == 0 ? text.substr(5) : "";
    if (digits.empty() || digits.size() > 4 || digits.find_first_not_of("0123456789") != std::string::npos) {
        throw InputError("unknown device '" + one_line(text, 80) + "'; expected cpu, cuda or cuda:N");
    }
    return {true, std::stoi(digits)};
}

std::string runtime_version() { return std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString(); }

Ort::SessionOptions make_session_options(Ort::Env& env, const Manifest& manifest, const Options& options, Graph graph,
                                         const Shape& modulation) {
    const Device device = parse_device(options.device);
    const std::string provider = options.provider.empty() ? (device.cuda ? "cuda" : "cpu") : options.provider;
    if (provider != "cpu" && provider != "cuda" && provider != "tensorrt") {
        throw InputError("unknown provider '" + one_line(provider, 80) + "'; expected cpu, cuda or tensorrt");
    }
    if ((provider == "cpu") == device.cuda) {
        throw InputError("the provider " + provider + " runs on " + (device.cuda ? "cpu" : "cuda:N") + ", got the device " +
                         options.device);
    }
    if (provider == "tensorrt" && manifest.precision == "int8") {
        throw InputError("the provider tensorrt runs no int8 engines, whose 8-bit values are unsigned; use an fp16 or fp32 one, or cuda");
    }
    if (options.threads < 0 || options.threads > machine_threads()) {
        throw InputError("expected 1 to " + std::to_string(machine_threads()) +
                         " threads, as this machine's CPU has, or 0 for one for each core that the process may use, got " +
                         std::to_string(options.threads));
    }
    try {
        Ort::SessionOptions session;
        session.SetIntraOpNumThreads(device.cuda ? 1 : session_threads(options));
        session.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
        // Every session has threads of its own. Those of the last graph must not spin while the next one runs.
        session.AddConfigEntry("session.force_spinning_stop", "1");
        // TensorRT may choose float16 for what a graph has in float32; the sampler's numbers are float32 in every engine.
        if (provider == "tensorrt" && graph != Graph::sampler) append_tensorrt(session, device.index, manifest, graph, modulation);
        if (provider != "cpu") append_cuda(session, device.index);
        if (provider == "cpu" && manifest.precision == "int8" && manifest.weight_bits > safe_weight_bits && int8_saturates(env)) {
            // Slower kernels, but right ones. Where the rest is float16, ONNX Runtime (1.32) refuses what it makes of the weights for them:
            // there products are those of floats.
            session.AddConfigEntry(manifest.float_type == "float16" ? "session.disable_quant_qdq" : "session.x64quantprecision", "1");
        }
        return session;
    } catch (const Ort::Exception& error) {
        throw BackendError(runtime_version() + " cannot use " + options.device + " (" + provider + "): " + first_line(error.what()));
    }
}

std::optional<std::size_t> pictures_at_once(const Model& model, const Options& options) {
    if (parse_device(options.device).cuda) return std::nullopt;
    const std::int64_t pictures = cached_features * threads_used(options) / options.slots / (model.length() * model.dim);
    return static_cast<std::size_t>(std::max<std::int64_t>(1, pictures));
}

std::optional<std::size_t> most_pictures(const Options& options) {
    if (options.provider != "tensorrt") return std::nullopt;
    return static_cast<std::size_t>(tensorrt_images);
}

}  // namespace enat
